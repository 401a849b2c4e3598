"""The configuration files: YAML with positions, pydantic models, and the core's policies made of them."""

from kvmsnapd.config.files import fingerprint
from kvmsnapd.config.load import Config, Setting, load_config, service_directory

__all__ = ["Config", "Setting", "fingerprint", "load_config", "service_directory"]
