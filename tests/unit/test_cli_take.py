"""`kvmsnapd take`, in this process, on libvirt's test driver."""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree as ET
from datetime import timedelta
from typing import TYPE_CHECKING

import libvirt
import pytest

from kvmsnapd.cli import main, work
from kvmsnapd.naming import parse_mark, parse_name
from kvmsnapd.state_files import DomainLocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Capture = pytest.CaptureFixture[str]

URI = "test:///default"
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
POLICIES = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s, max_age: 400d}
  extra: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s, max_age: 400d}
  outside: {schedule: yearly, keep: {last: 2}, kind: external, splay: 0s, max_age: 400d}
"""


class Shop:
    """The test driver's one domain, which all connections of this process share, and a configuration."""

    def __init__(self, directory: Path, capsys: Capture) -> None:
        self.directory, self._capsys = directory, capsys
        self.connection = libvirt.open(URI)
        self.domain = self.connection.lookupByName("test")
        self.configure("test: [standard]")

    def configure(self, domains: str, policies: str = POLICIES) -> None:
        own = f"state_directory: {self.directory}/state\nruntime_directory: {self.directory}/run\n"
        (self.directory / "kvmsnapd.yaml").write_text(f"{policies}domains:\n  {domains}\n{own}")

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Return what a command prints on stdout and stderr; it must end with this code."""
        command, *rest = words
        options = ["--config", str(self.directory / "kvmsnapd.yaml"), "--connect", URI]
        assert main([command, *options, *rest]) == code
        said = self._capsys.readouterr()
        return said.out, said.err

    @property
    def names(self) -> list[str]:
        return sorted(self.domain.snapshotListNames())

    def mark(self, name: str) -> object:
        text = self.domain.snapshotLookupByName(name).getXMLDesc()
        return parse_mark(name, ET.fromstring(text).findtext("description") or "")  # noqa: S314

    @property
    def locks(self) -> DomainLocks:
        return DomainLocks(self.directory / "run" / "locks")


@pytest.fixture
def shop(tmp_path: Path, capsys: Capture) -> Iterator[Shop]:
    shop = Shop(tmp_path, capsys)
    yield shop
    for snapshot in shop.domain.listAllSnapshots(0):
        snapshot.delete(0)
    shop.connection.close()


def test_it_takes_by_the_domains_only_policy_and_says_what(shop: Shop) -> None:
    out, err = shop.run("take", "test")
    (name,) = shop.names
    parsed = parse_name(name)
    assert parsed is not None
    assert parsed[0] == "standard"
    assert (out.startswith(f"test: took {name} (internal, memory"), err) == (True, "")


def test_a_hold_is_written_with_the_take(shop: Shop) -> None:
    out, _ = shop.run("take", "test", "--hold", "before the upgrade")
    (name,) = shop.names
    assert shop.mark(name).hold.reason == "before the upgrade"  # type: ignore[attr-defined]
    assert f"`kvmsnapd release test {name}`" in out


def test_a_hold_without_a_reason_is_a_usage_error(shop: Shop) -> None:
    _, err = shop.run("take", "test", "--hold", " ", code=2)
    assert err == "kvmsnapd: --hold needs a reason, for whoever finds it\n"
    assert shop.names == []


def test_of_several_policies_one_has_to_be_named(shop: Shop) -> None:
    shop.configure("test: [standard, extra]")
    _, err = shop.run("take", "test", code=2)
    assert err == "kvmsnapd: test has the policies standard, extra; say which with --policy\n"
    shop.run("take", "test", "--policy", "extra")
    assert [name.split("-")[1] for name in shop.names] == ["extra"]


def test_a_domain_without_policy_needs_one_and_is_told_that_nothing_prunes_it(shop: Shop) -> None:
    shop.configure("test: []")
    _, err = shop.run("take", "test", code=2)
    assert err == "kvmsnapd: test has no policy; name one with --policy (configured: standard, extra, outside)\n"
    _, err = shop.run("take", "test", "--policy", "extra")
    assert len(shop.names) == 1
    assert err == (
        "test: policy extra does not apply to it, so nothing prunes this snapshot; "
        "`kvmsnapd forget test --policy extra` deletes it\n"
    )


def test_a_policy_of_the_other_kind_or_of_no_name_takes_nothing(shop: Shop) -> None:
    _, err = shop.run("take", "test", "--policy", "outside", code=2)
    assert "policy outside takes external snapshots, and test has policy standard, which takes internal ones" in err
    _, err = shop.run("take", "test", "--policy", "sandard", code=2)
    assert err == "kvmsnapd: no policy 'sandard' is configured; there is standard, extra, outside\n"
    assert shop.names == []


def test_a_refused_domain_ends_with_1_and_why(shop: Shop) -> None:
    shop.configure("test: [outside]")  # the test driver has no external snapshots
    out, err = shop.run("take", "test", code=1)
    assert out == ""
    assert err.startswith("test: nothing was taken: libvirt's test driver has no external snapshots")


def test_json_has_a_result_for_each_domain_and_nothing_else_is_printed(shop: Shop) -> None:
    out, err = shop.run("take", "test", UUID, "--json")
    (answer,) = json.loads(out)  # named twice, taken once
    assert (answer["domain"], answer["policy"], answer["result"]) == ("test", "standard", "taken")
    assert [answer["snapshot"]] == shop.names
    assert err == ""


def test_it_waits_for_whoever_works_on_the_domain_and_says_for_whom(shop: Shop) -> None:
    release = threading.Event()
    held = threading.Event()

    def work_on_it() -> None:
        with shop.locks.hold(UUID, wait=timedelta(0), doing="the daemon's run of standard"):
            held.set()
            release.wait(20)

    holder = threading.Thread(target=work_on_it)
    holder.start()
    held.wait()
    timer = threading.Timer(1.4, release.set)
    timer.start()
    _, err = shop.run("take", "test")
    holder.join()
    assert err.endswith(": the daemon's run of standard; Ctrl-C to give up\n")
    assert err.startswith("test: waiting for process ")
    assert len(shop.names) == 1


def test_without_a_terminal_it_does_not_wait_for_ever(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_SCRIPT_WAITS", timedelta(0))
    with shop.locks.hold(UUID, wait=timedelta(0), doing="the daemon's run of standard"):
        _, err = shop.run("take", "test", code=1)
    assert "the domain is being worked on by process" in err
    assert "the daemon's run of standard" in err
    assert shop.names == []


def test_an_unknown_domain_takes_nothing_of_the_others(shop: Shop) -> None:
    _, err = shop.run("take", "test", "tset", code=1)
    assert err == "kvmsnapd: libvirt has no domain 'tset'; did you mean 'test'?\n"
    assert shop.names == []
