"""The configuration file: YAML with positions, pydantic models, and the core's policies made of them."""

from kvmsnapd.config.load import Config, load_config

__all__ = ["Config", "load_config"]
