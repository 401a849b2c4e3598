"""libvirt behind the :class:`kvmsnapd.hypervisor.Hypervisor` port. Only this package imports ``libvirt``."""

from kvmsnapd.libvirt_host.host import LibvirtHost

__all__ = ["LibvirtHost"]
