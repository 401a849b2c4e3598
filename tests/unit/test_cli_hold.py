"""`kvmsnapd hold` and `release`, in this process, on libvirt's test driver."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kvmsnapd.domain_xml import format_request
from kvmsnapd.model import Consistency, Deleting, Hold, Kind, Mark, Restoring, TakeRequest
from kvmsnapd.naming import format_name
from tests.unit.test_cli_take import UUID, Shop, shop

__all__ = ["shop"]

NOW = datetime.now(UTC).replace(microsecond=0)
ELSEWHERE = "00000000-0000-0000-0000-000000000001"


def make(shop: Shop, **fields: Any) -> str:  # noqa: ANN401  # whatever the class takes
    """Make a snapshot of ours with this in its mark."""
    slot = NOW - timedelta(days=1)
    mark = replace(Mark("standard", slot, slot, Consistency.MEMORY, Kind.INTERNAL), **fields)
    name = format_name("standard", slot)
    shop.domain.snapshotCreateXML(format_request(TakeRequest(UUID, "test", name, mark)), 0)
    return name


def held(shop: Shop, name: str) -> Hold | None:
    mark = shop.mark(name)
    assert isinstance(mark, Mark)
    return mark.hold


def test_a_hold_is_written_and_released(shop: Shop) -> None:
    name = make(shop)
    out, _ = shop.run("hold", "test", "newest", "before the move")
    assert out == f"test: {name} is held: before the move. `kvmsnapd release test {name}` ends it.\n"
    assert held(shop, name) == Hold("before the move")
    out, _ = shop.run("release", "test", name)
    assert out == f"test: {name} is released (it was held: before the move); retention judges it again.\n"
    assert held(shop, name) is None
    out, _ = shop.run("release", "test", name)
    assert out == f"test: {name} was not held; nothing was changed.\n"


def test_a_second_hold_replaces_the_first_and_says_so(shop: Shop) -> None:
    name = make(shop, hold=Hold("audit"))
    out, _ = shop.run("hold", "test", name, "lawsuit")
    assert "is held: lawsuit." in out
    assert out.endswith(" Before: audit.\n")
    assert held(shop, name) == Hold("lawsuit")


@pytest.mark.parametrize(
    ("text", "until"),
    [("2999-12-31T18:00+01:00", "2999-12-31T17:00:00+00:00"), ("2999-06-30T18:00", "2999-06-30T18:00:00+00:00")],
)
def test_it_may_end_at_a_time(shop: Shop, text: str, until: str) -> None:
    name = make(shop)
    shop.run("hold", "test", name, "audit", "--until", text)
    found = held(shop, name)
    assert found is not None
    assert found.until == datetime.fromisoformat(until)


def test_it_may_end_after_a_while(shop: Shop) -> None:
    name = make(shop)
    before = datetime.now(UTC).replace(microsecond=0)
    shop.run("hold", "test", name, "audit", "--until", "14d")
    found = held(shop, name)
    assert found is not None
    assert found.until is not None
    assert before <= found.until - timedelta(days=14) <= datetime.now(UTC)


@pytest.mark.parametrize("text", ["soon", "2020-01-01", "0s"])
def test_an_end_that_is_none_is_a_usage_error(shop: Shop, text: str) -> None:
    name = make(shop)
    _, err = shop.run("hold", "test", name, "audit", "--until", text, code=2)
    assert err.startswith(f"kvmsnapd: --until: {text!r} is ")
    assert held(shop, name) is None


def test_a_reason_has_to_be_given(shop: Shop) -> None:
    shop.run("hold", "test", make(shop), " ", code=2)


def test_a_foreign_snapshot_is_left_alone_and_virsh_is_named(shop: Shop) -> None:
    shop.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
    for verb, words in (("hold", ["why"]), ("release", [])):
        _, err = shop.run(verb, "test", "mine", *words, code=1)
        assert err.startswith(f"kvmsnapd: test: mine was not made by kvmsnapd, so there is nothing to {verb}")
        assert "`virsh snapshot-delete test mine`" in err


def test_one_that_is_half_deleted_cannot_be_held(shop: Shop) -> None:
    name = make(shop, deleting=Deleting(NOW))
    _, err = shop.run("hold", "test", name, "precious", code=1)
    assert "half deleted and no way back any more" in err
    assert held(shop, name) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"linked": (UUID,)}, f"carries the linked copy {UUID}; it is free once that is undefined"),
        ({"restoring": Restoring(NOW)}, "finishes that and frees it"),
    ],
)
def test_what_holds_by_itself_is_not_released(shop: Shop, fields: dict[str, Any], words: str) -> None:
    name = make(shop, **fields)
    _, err = shop.run("release", "test", name, code=1)
    assert words in err


def test_the_link_of_a_copy_that_is_gone_holds_nothing(shop: Shop) -> None:
    name = make(shop, linked=(ELSEWHERE,))
    shop.run("release", "test", name)
    mark = shop.mark(name)
    assert isinstance(mark, Mark)
    assert mark.linked == ()


def test_json_has_what_is_and_what_was(shop: Shop) -> None:
    name = make(shop, hold=Hold("audit"))
    out, _ = shop.run("hold", "test", name, "lawsuit", "--until", "2999-12-31T00:00Z", "--json")
    answer = json.loads(out)
    assert answer["hold"] == {"reason": "lawsuit", "until": "2999-12-31T00:00:00+00:00"}
    assert answer["before"] == {"reason": "audit", "until": None}
