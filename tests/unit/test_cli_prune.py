"""`kvmsnapd prune`, in this process, on libvirt's test driver."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.domain_xml import format_request
from kvmsnapd.model import Consistency, Hold, Kind, Mark, TakeRequest
from kvmsnapd.naming import format_name
from tests.unit.test_cli_take import UUID, Shop, shop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["shop"]

NOW = datetime.now(UTC).replace(microsecond=0)


def fill(shop: Shop, count: int, *, policy: str = "standard", hold: Hold | None = None) -> list[str]:
    """Make snapshots of ours, one a day, and return their names, oldest first."""
    names = []
    for day in range(count, 0, -1):
        slot = NOW - timedelta(days=day)
        name = format_name(policy, slot)
        mark = Mark(policy, slot, slot, Consistency.MEMORY, Kind.INTERNAL, hold=hold)
        shop.domain.snapshotCreateXML(format_request(TakeRequest(UUID, "test", name, mark)), 0)
        names.append(name)
    return names


class Terminal(io.StringIO):
    """A person who types this."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", Terminal(text))


def test_it_goes_past_the_fuse_once_a_person_says_yes(shop: Shop, types: Callable[[str], None]) -> None:
    names = fill(shop, 15)
    types("y\n")
    out, err = shop.run("prune", "test")
    assert err == "Delete 13 snapshot(s) of 1 domain(s)? [y/N] "
    assert out.splitlines()[:2] == ["test  policy standard", f"  delete  {names[0]}  last=2 used up"]
    assert out.splitlines()[-1] == "13 of 13 deleted."
    assert shop.names == names[-2:]


@pytest.mark.parametrize("typed", ["\n", "n\n", "", "yesterday\n"])
def test_anything_else_is_a_no(shop: Shop, types: Callable[[str], None], typed: str) -> None:
    names = fill(shop, 3)
    types(typed)
    out, _ = shop.run("prune", code=1)
    assert out.endswith("Nothing was deleted.\n")
    assert shop.names == names


def test_without_a_terminal_it_shows_the_plan_and_wants_yes(shop: Shop) -> None:
    names = fill(shop, 3)
    out, err = shop.run("prune", code=2)
    assert f"  delete  {names[0]}" in out
    assert "add --yes" in err
    assert shop.names == names
    shop.run("prune", "--yes")
    assert shop.names == names[1:]


def test_held_and_foreign_ones_stay_and_so_do_those_of_no_policy(shop: Shop) -> None:
    held = fill(shop, 3, policy="extra", hold=Hold("audit"))
    shop.configure("test: [standard, extra]")
    shop.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
    out, _ = shop.run("prune", "--yes")
    assert out == "Nothing to delete.\n"
    shop.configure("test: []")
    fill(shop, 9)
    out, _ = shop.run("prune", "--yes")
    assert out == "Nothing to delete.\n"
    assert set(held) | {"mine"} <= set(shop.names)
    assert len(shop.names) == 13


def test_json_says_what_went(shop: Shop) -> None:
    names = fill(shop, 3)
    out, err = shop.run("prune", "--yes", "--json")
    (answer,) = json.loads(out)
    assert answer["deletes"] == [{"snapshot": names[0], "reasons": ["last=2 used up"], "deleted": True}]
    assert "delete" in err  # the plan, for whoever looks on


def test_what_was_not_shown_is_not_deleted(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    names = fill(shop, 4)

    def edit_meanwhile(_question: str, *, yes: bool) -> bool:
        shop.domain.snapshotLookupByName(names[-1]).delete(0)
        return yes or True

    monkeypatch.setattr("kvmsnapd.cli.prune.agrees", edit_meanwhile)
    out, err = shop.run("prune", code=1)
    assert "1 of 2 deleted." in out
    assert f"{names[1]} is still there: changed: retention keeps it now" in err
    assert shop.names == names[1:3]
