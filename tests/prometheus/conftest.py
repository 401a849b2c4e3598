"""What Prometheus is told does not depend on the generation of libvirt: the machine's own is enough."""

from tests.bench.conftest import libvirtd

__all__ = ["libvirtd"]
