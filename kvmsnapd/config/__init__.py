"""The configuration files: YAML with positions, pydantic models, and the core's policies made of them."""

from kvmsnapd.config.files import fingerprint, read_contents
from kvmsnapd.config.load import Config, Setting, load_config, load_contents, runtime_directory_of
from kvmsnapd.config.models import NEEDS_RESTART

__all__ = [
    "NEEDS_RESTART",
    "Config",
    "Setting",
    "fingerprint",
    "load_config",
    "load_contents",
    "read_contents",
    "runtime_directory_of",
]
