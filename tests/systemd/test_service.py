"""The package on booted machines of both releases: everything that a host's administrator relies on for years."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.commands import LabError
from tests.lab.stopped_thread import stopped_thread
from tests.systemd.installed import CONFIG

if TYPE_CHECKING:
    from tests.systemd.installed import Installed

pytestmark = [pytest.mark.systemd, pytest.mark.slow]

FAST = """\
policies:
  fast:
    schedule: every 3s
    splay: 0s
    keep: {last: 2}
    min_free: 1MiB
domains:
  "{guest}": [fast]
tick: 1s
"""
RARE = FAST.replace("every 3s", "yearly")


def test_a_first_start_runs_and_says_what_to_do(host: Installed) -> None:
    assert host.show("UnitFileState") == "disabled"
    assert host.show("ActiveState") == "inactive"
    host.shell("systemctl enable --now kvmsnapd.service")
    told = host.wait_for(lambda: host.show("StatusText"))
    assert told == (
        "1 domain(s) unprotected; no domain has a policy yet: give some in kvmsnapd.yaml, or see what `kvmsnapd init` "
        "proposes"
    )
    assert host.metrics()["kvmsnapd_domain_unprotected", host.guest.name] == 1
    assert host.guest.snapshots == []


def test_ten_lines_and_it_takes_and_prunes_and_reloads(host: Installed) -> None:
    assert len(FAST.splitlines()) <= 10
    host.configure(FAST)
    host.shell("kvmsnapd check-config --connect qemu:///system")
    host.shell("systemctl enable --now kvmsnapd.service")
    host.wait_taken(4)
    host.wait_for(lambda: len(host.guest.snapshots) <= 3)
    assert all(name.startswith("kvmsnapd-fast-") for name in host.guest.snapshots)
    assert {run["consistency"] for run in host.taken()} == {"filesystem"}
    status = host.shell("systemctl status --no-pager kvmsnapd.service")
    assert re.search(rf'Status: "1 domain\(s\) protected, next {host.guest.name}/fast (at|now)', status)
    found = host.metrics()
    assert found["kvmsnapd_libvirt_up",] == 1
    assert found["kvmsnapd_domain_unprotected", host.guest.name] == 0

    host.configure(FAST.replace("last: 2", "last: 3"))
    host.shell("systemctl reload kvmsnapd.service")
    host.wait_for(lambda: host.events("config.loaded"))
    host.configure(FAST.replace("schedule:", "schedul:"))
    with pytest.raises(LabError, match=r"Job for kvmsnapd\.service failed"):
        host.shell("systemctl reload kvmsnapd.service")
    assert "did you mean `schedule`" in host.shell("journalctl --no-pager -u kvmsnapd.service")
    assert host.show("ActiveState") == "active"
    host.wait_for(lambda: "the edited configuration is refused" in host.show("StatusText"))
    before = len(host.taken())
    host.wait_taken(before + 2)  # by the configuration before

    with pytest.raises(LabError):
        host.shell("systemctl restart kvmsnapd.service")
    assert (host.show("ExecMainStatus"), host.show("NRestarts")) == ("78", "0")
    host.configure(FAST)
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(before + 4)


def test_the_watchdog_starts_a_daemon_anew_whose_schedules_stand_still(host: Installed) -> None:
    host.configure(FAST, drop_in="[Service]\nWatchdogSec=8\nRestartSec=1\n")
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(1)
    with stopped_thread("APScheduler", host.machine.leader):
        host.wait_for(lambda: "the scheduler has not answered" in host.show("StatusText"))
        host.wait_for(lambda: host.show("NRestarts") == "1")
    assert host.events("daemon.stalled")
    said = host.shell("journalctl --no-pager -u kvmsnapd.service")
    assert "Watchdog timeout" in said
    assert "apscheduler" in said  # the stacks of all threads
    before = len(host.taken())
    host.wait_taken(before + 2)


def test_a_stop_lets_a_take_and_its_hooks_end(host: Installed) -> None:
    hook = "    hooks: {after: {command: [/bin/sleep, '3']}}\n    kind: internal\n"
    host.configure(FAST.replace("    min_free", hook + "    min_free"))
    host.shell("systemctl start kvmsnapd.service")
    # libvirt stops the guest while it saves its RAM.
    host.shell(f"until virsh domstate {host.guest.name} | grep -q paused; do :; done")
    host.shell("systemctl stop kvmsnapd.service")
    assert host.show("Result") == "success"
    (stopped,) = host.events("daemon.stopped")
    assert stopped["unfinished"] == []
    *_, last = host.events("run.finished")
    assert (last["result"], last["hooks"]) == ("taken", {"after": True})
    assert last["snapshot"] == host.guest.snapshots[-1]
    assert host.guest.agent_answers()


def test_after_a_reboot_it_catches_up(host: Installed) -> None:
    host.configure(FAST.replace("every 3s", "every 20s"))
    host.shell(f"systemctl enable --now kvmsnapd.service && virsh autostart {host.guest.name}")
    host.wait_taken(1)
    host.machine.stop()
    time.sleep(20)
    started = time.time()
    host.machine.start()
    host.wait_for(lambda: host.show("ActiveState") == "active")
    first = host.wait_for(lambda: [run for run in host.taken() if _slot(run["snapshot"]) < started])
    taken = [run["snapshot"] for run in host.taken()]
    assert len(set(taken)) == len(taken)
    assert first[-1]["result"] == "taken"
    host.wait_for(lambda: [run for run in host.taken() if _slot(run["snapshot"]) > started])


def _slot(name: str) -> float:
    return time.mktime(time.strptime(name.rpartition("-")[2] + " UTC", "%Y%m%dT%H%M%SZ %Z")) - time.timezone


PROBE = """\
#!/usr/bin/python3
# Runs as a hook, so inside the unit; notes what it may do.
import errno, json, mmap, os, pwd, socket

def may(what):
    try:
        what()
    except (OSError, ValueError) as error:
        return errno.errorcode.get(getattr(error, "errno", 0), str(error))
    return "yes"

found = {
    "user": pwd.getpwuid(os.getuid()).pw_name,
    "capabilities": open("/proc/self/status").read().partition("CapBnd:")[2].split()[0],
    "read /root": may(lambda: os.listdir("/root")),
    "read /home": may(lambda: os.listdir("/home/somebody")),
    "write /etc": may(lambda: open("/etc/probe", "w")),
    "write /usr": may(lambda: open("/usr/probe", "w")),
    "write its configuration": may(lambda: open("/etc/kvmsnapd/kvmsnapd.yaml", "a")),
    "write images": may(lambda: open("/var/lib/libvirt/images/probe", "w")),
    "write its state": may(lambda: open("/var/lib/kvmsnapd/probe", "w")),
    "unix socket": may(lambda: socket.socket(socket.AF_UNIX)),
    "internet socket": may(lambda: socket.socket(socket.AF_INET)),
    "internet 6 socket": may(lambda: socket.socket(socket.AF_INET6)),
    "netlink socket": may(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "packet socket": may(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "executable memory": may(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
    "new namespace": may(lambda: os.unshare(os.CLONE_NEWUSER) if hasattr(os, "unshare") else os.listdir("/nowhere")),
    "devices": sorted(set(os.listdir("/dev")) & {"sda", "vda", "kvm", "mem"}),
}
json.dump(found, open("/var/lib/kvmsnapd/found.json", "w"))
"""


def test_the_service_can_do_what_it_needs_and_no_more(host: Installed) -> None:
    host.machine.put(Path("/usr/local/sbin/probe"), PROBE)
    host.shell("chmod 755 /usr/local/sbin/probe; mkdir -p /home/somebody")
    hook = "    hooks: {before: {command: [/usr/local/sbin/probe], required: true}}\n"
    host.configure(FAST.replace("    min_free", hook + "    min_free"))
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(3)
    found = json.loads(host.shell("cat /var/lib/kvmsnapd/found.json"))
    print(found)
    refused = {"EACCES", "EPERM", "EROFS", "ENOENT"}
    for what in ("read /root", "read /home", "write /etc", "write /usr", "write its configuration", "write images"):
        assert found.pop(what) in refused
    assert found.pop("executable memory") in refused
    assert found.pop("new namespace") in refused  # python 3.11 has no call for it
    assert found == {
        "user": "kvmsnapd",
        "capabilities": "0000000000000000",
        "write its state": "yes",
        "unix socket": "yes",
        "internet socket": "yes",
        "internet 6 socket": "yes",
        "netlink socket": "EAFNOSUPPORT",
        "packet socket": "EAFNOSUPPORT",
        "devices": [],
    }


def test_its_user_takes_prunes_and_restores(host: Installed) -> None:
    host.configure(RARE)
    guest, own = host.guest, "runuser -u kvmsnapd -- kvmsnapd"
    guest.write("/mnt/file", b"A")
    host.shell(f"{own} take {guest.name} --hold 'before the change'")
    guest.write("/mnt/file", b"B")
    (first,) = guest.snapshots
    host.shell(f"{own} restore --yes --start {guest.name} {first}", timeout_s=120)
    host.wait_for(guest.agent_answers)
    assert guest.read("/mnt/file") == b"A"
    for _ in range(3):
        time.sleep(1.1)  # slots have seconds
        host.shell(f"{own} take {guest.name}")
    host.shell(f"{own} prune --yes")
    assert first in guest.snapshots
    assert host.shell(f"{own} doctor || true").count("problem:") == 0


def test_systemd_finds_nothing_to_say_about_the_unit(host: Installed) -> None:
    assert host.shell("systemd-analyze verify --man=no /usr/lib/systemd/system/kvmsnapd.service 2>&1") == ""
    said = host.shell("systemd-analyze security --no-pager kvmsnapd.service || true")
    score = re.search(r"Overall exposure level for kvmsnapd.service: (\d+\.\d+)", said)
    assert score
    print(score[0])
    assert float(score[1]) <= 1.5


def test_an_upgrade_keeps_what_the_administrator_wrote_and_purging_keeps_the_snapshots(host: Installed) -> None:
    host.configure(FAST)
    host.shell("systemctl enable --now kvmsnapd.service")
    host.wait_taken(2)
    written = host.shell(f"cat {CONFIG}")
    newer = """
        rm -rf /srv/newer && dpkg-deb -R /srv/kvmsnapd.deb /srv/newer
        sed -i 's/^Version: .*/Version: 99.0/' /srv/newer/DEBIAN/control
        echo '# a newer default' >> /srv/newer/etc/kvmsnapd/kvmsnapd.yaml
        dpkg-deb --root-owner-group -Zgzip -b /srv/newer /srv/newer.deb
        dpkg --force-confdef --force-confold -i /srv/newer.deb 2>&1"""
    before = host.show("MainPID")
    print(host.shell(newer, timeout_s=120))
    assert host.shell(f"cat {CONFIG}") == written
    assert host.show("UnitFileState") == "enabled"
    assert host.show("MainPID") != before
    count = len(host.taken())
    host.wait_taken(count + 2)

    print(host.shell("dpkg --remove kvmsnapd 2>&1"))
    kept = host.guest.snapshots
    assert kept
    assert host.shell(f"cat {CONFIG}") == written
    print(host.shell("dpkg --purge kvmsnapd 2>&1", timeout_s=60))
    assert host.guest.snapshots == kept
    assert host.guest.agent_answers()
    host.shell(f"virsh snapshot-dumpxml {host.guest.name} {kept[-1]} | grep -q domainsnapshot")
    for left in ("/etc/kvmsnapd", "/opt/kvmsnapd", "/var/lib/kvmsnapd", "/run/kvmsnapd", "/usr/bin/kvmsnapd"):
        host.shell(f"! test -e {left}")
    assert host.show("LoadState") == "not-found"
    assert "kvmsnapd" not in host.shell("systemctl --failed; find /etc/systemd/system/*.wants")
    host.install()
    host.shell("systemctl daemon-reload")
