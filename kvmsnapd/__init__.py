"""kvmsnapd takes and prunes libvirt snapshots on schedule and tells Prometheus how old they are."""

__version__ = "0.1.0"
