"""`kvmsnapd forget`, in this process, on libvirt's test driver."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvmsnapd.model import Hold, Restoring
from tests.unit.test_cli_hold import NOW, make
from tests.unit.test_cli_prune import fill, types
from tests.unit.test_cli_take import UUID, Shop, shop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["shop", "types"]


def test_all_of_ours_goes_and_what_is_held_is_named(shop: Shop, types: Callable[[str], None]) -> None:
    names = fill(shop, 3)
    (kept,) = fill(shop, 1, policy="gone", hold=Hold("audit"))
    types("y\n")
    out, err = shop.run("forget", "test")
    assert err == "Delete 4 snapshot(s) of test for good? [y/N] "
    assert f"  delete  {kept}  which is held: audit" in out
    assert [line for line in out.splitlines() if line.startswith("  delete")][-1].endswith("audit")
    assert f"test: deleted {names[0]} (forgotten; " in out
    assert "test has no snapshots left: virsh undefine and migrate accept it" in out
    assert "Policy standard still applies to test" in out
    assert shop.names == []


def test_foreign_ones_stay_and_libvirt_will_refuse(shop: Shop) -> None:
    fill(shop, 2)
    shop.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
    out, _ = shop.run("forget", "test", "--yes")
    assert "  stays   mine  foreign: never touched" in out
    assert "test has 1 snapshot(s) left (mine): virsh undefine and migrate refuse it" in out
    assert shop.names == ["mine"]


def test_of_one_policy_only_its_own_go(shop: Shop) -> None:
    fill(shop, 2)
    left = fill(shop, 2, policy="extra")
    shop.run("forget", "test", "--policy", "standard", "--yes")
    assert shop.names == left


def test_nobody_to_ask_means_no(shop: Shop) -> None:
    names = fill(shop, 2)
    _, err = shop.run("forget", "test", code=2)
    assert "add --yes" in err
    assert shop.names == names


def test_a_domain_on_which_a_copy_stands_is_refused_as_a_whole(shop: Shop) -> None:
    name = make(shop, linked=(UUID,))
    _, err = shop.run("forget", "test", "--yes", code=1)
    assert f"the linked copy {UUID} stands on {name}; it goes once that domain is undefined" in err
    assert shop.names == [name]


def test_a_domain_in_a_restore_is_refused_as_a_whole(shop: Shop) -> None:
    name = make(shop, restoring=Restoring(NOW))
    _, err = shop.run("forget", "test", "--yes", code=1)
    assert f"`kvmsnapd restore test {name}` finishes it" in err
    assert shop.names == [name]


def test_again_it_has_nothing_to_do(shop: Shop) -> None:
    fill(shop, 1)
    shop.run("forget", "test", "--yes")
    out, _ = shop.run("forget", "test", "--yes")
    assert out.startswith("test has nothing of ours.\n")


def test_json_has_the_disks_and_what_libvirt_will_say(shop: Shop) -> None:
    names = fill(shop, 2)
    out, _ = shop.run("forget", "test", "--yes", "--json")
    answer = json.loads(out)
    assert sorted(answer["deleted"]) == names
    assert answer["may_be_undefined"] is True
    assert answer["disks"] == {"vda": "/guest/diskimage1"}
    assert answer["policies"] == ["standard"]
