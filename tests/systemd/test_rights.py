"""What the service may do: with the rule of the package, and with libvirt's own access driver and the stricter one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.commands import LabError
from tests.systemd.test_service import FAST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.systemd.installed import Installed

pytestmark = [pytest.mark.systemd, pytest.mark.slow]

_SHIPPED = Path("/usr/share/doc/kvmsnapd/systemd/acl/kvmsnapd.rules")
_RULE = Path("/usr/share/polkit-1/rules.d/60-kvmsnapd.rules")
_RULES = Path("/etc/polkit-1/rules.d/50-kvmsnapd.rules")
_DRILLS = '["domain.init-control", "domain.open-device", "domain.save", "domain.start", "domain.stop"]'
VERIFIED = FAST.replace("    min_free", "    verify: {schedule: hourly, memory: 128MiB}\n    min_free")


@pytest.fixture
def strict_host(host: Installed) -> Iterator[Installed]:
    """Provide a host as systemd/README.md describes the stricter choice."""
    host.shell(f"cp {_SHIPPED} {_RULES}; echo 'access_drivers = [ \"polkit\" ]' >> /etc/libvirt/libvirtd.conf")
    host.shell("systemctl restart polkit libvirtd")
    yield host
    host.shell(f"rm {_RULES}; sed -i '/^access_drivers/d' /etc/libvirt/libvirtd.conf")
    host.shell("systemctl restart polkit libvirtd")


def test_nobody_else_is_let_in_by_the_rule_of_the_package(host: Installed) -> None:
    host.shell("useradd somebody 2>/dev/null || true")
    assert host.guest.name in host.shell("runuser -u kvmsnapd -- virsh -c qemu:///system list --name")
    with pytest.raises(LabError, match="authentication"):
        host.shell("runuser -u somebody -- virsh -c qemu:///system list --name")


def test_without_the_rule_the_group_libvirt_is_enough(host: Installed) -> None:
    host.shell(f"mv {_RULE} /srv; systemctl restart polkit")
    try:
        host.configure(FAST)
        with pytest.raises(LabError, match="authentication"):
            host.shell("runuser -u kvmsnapd -- virsh -c qemu:///system list")
        host.shell("usermod -aG libvirt kvmsnapd; systemctl start kvmsnapd.service")
        host.wait_taken(3)
        host.wait_for(lambda: len(host.guest.snapshots) <= 3)
    finally:
        host.shell(f"mv /srv/{_RULE.name} {_RULE}; gpasswd -d kvmsnapd libvirt; systemctl restart polkit")


def test_the_stricter_rule_is_enough_for_schedules_and_drills_and_refuses_the_rest(strict_host: Installed) -> None:
    host = strict_host
    host.configure(VERIFIED)
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(4)
    assert host.wait_for(lambda: host.events("drill.finished"))[0]["ok"]
    assert {run["consistency"] for run in host.taken()} == {"filesystem"}
    # Asked inside: the access driver refuses who has no process number there, as a test has not.
    host.wait_for(lambda: len(host.shell(f"virsh snapshot-list --name {host.guest.name}").split()) <= 3)
    assert not [event for event in host.events("run.finished") if event["result"] == "failed"]
    host.shell("systemctl stop kvmsnapd.service")
    for refused in ("undefine", "managedsave", "screenshot"):
        with pytest.raises(LabError, match="access denied"):
            host.shell(f"runuser -u kvmsnapd -- virsh -c qemu:///system {refused} {host.guest.name}")


def test_without_the_rights_for_drills_schedules_go_on_and_drills_say_what_is_missing(strict_host: Installed) -> None:
    host = strict_host
    rules = host.shell(f"cat {_RULES}")
    assert _DRILLS in rules
    host.machine.put(_RULES, rules.replace(_DRILLS, "[]"))
    host.shell("systemctl restart polkit")
    host.configure(VERIFIED)
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(3)
    refused = host.wait_for(lambda: host.events("drill.skipped"))
    assert "libvirt does not allow this user to start a domain" in refused[0]["detail"]
    assert not host.events("drill.finished")
    with pytest.raises(LabError, match="access denied"):
        host.shell(f"runuser -u kvmsnapd -- virsh -c qemu:///system destroy {host.guest.name}")


def test_a_hook_may_start_a_unit_that_may_do_more(host: Installed) -> None:
    guide = (Path(__file__).parents[2] / "systemd/README.md").read_text()
    for path, text in re.findall(r"```\n(?:#|//) (/\S+)\n(.*?)```", guide, re.DOTALL):
        host.machine.put(Path(path), text)
    (hooks,) = re.findall(r"```\n# in the policy\n(.*?)\n```", guide)
    host.machine.put(Path("/usr/local/sbin/dump"), "#!/bin/sh\nid -un >/root/dumped-$1\n")
    host.shell("chmod 755 /usr/local/sbin/dump; systemctl daemon-reload; systemctl restart polkit")
    host.configure(FAST.replace("    min_free", f"    {hooks}\n    min_free"))
    host.shell("systemctl start kvmsnapd.service")
    host.wait_taken(1)
    assert host.shell("cat /root/dumped-db01") == "root\n"
    with pytest.raises(LabError):
        host.shell("runuser -u kvmsnapd -- systemctl --no-ask-password stop cron.service dump@db01.service")
