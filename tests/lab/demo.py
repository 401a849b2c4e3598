"""`./dev demo --qemu`: the demo on a private libvirtd with a real guest, frozen for each take."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import libvirt

from kvmsnapd.daemon import Daemon
from kvmsnapd.demo import Show
from tests.lab.guest import Guest
from tests.lab.libvirtd import Libvirtd

_CONFIG = """\
policies:
  standard:
    schedule: every 4s
    keep: {{last: 3, hourly: 1}}
    consistency: filesystem         # the guest agent must freeze, or none is taken
domains:
  demo: [standard]
metrics: {{port: 0}}
log: {{level: error}}
tick: 1s
state_directory: {directory}/state
runtime_directory: {directory}/run
"""


def main() -> int:
    """Boot the guest, run the daemon until Ctrl-C, then show what virsh sees."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would print that the guest is still booting
    with tempfile.TemporaryDirectory(prefix="kvmsnapd-demo-") as name, Libvirtd(Path(name) / "libvirt") as libvirtd:
        directory = Path(name)
        print("booting a guest…", flush=True)
        guest = Guest(libvirtd, "demo", directory / "guest", writer=True)
        guest.define()
        guest.start()
        guest.wait_up()
        config = directory / "kvmsnapd.yaml"
        config.write_text(_CONFIG.format(directory=directory))
        show = Show(
            "kvmsnapd demo: the daemon on a private libvirtd with one real guest\n"
            f"look for yourself: sudo virsh -c '{libvirtd.uri}' snapshot-list demo"
        )
        code = show.run(Daemon(config, connect=libvirtd.uri, watch=show.see))
        print(f"\n$ virsh snapshot-list demo\n{libvirtd.virsh('snapshot-list', 'demo')}")
        print(f"The guest is {'still running' if guest.alive() else 'NOT RUNNING'}; the demo ends it now.")
        guest.remove()
    return code


if __name__ == "__main__":
    sys.exit(main())
