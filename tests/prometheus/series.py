"""What the program exports, asked of the program itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector

from kvmsnapd.metrics import Metrics
from kvmsnapd.series import Observation

_SUFFIXES = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_count", "_sum")}


def exported_series() -> set[str]:
    """Return the full name of every series that a scrape of the endpoint can have."""
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    families = [*Metrics(Observation).registry.collect(), *process.collect()]
    return {family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, ("",))}
