"""`plan`: what the next run would do, and what an edit would change before it is put in force."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvmsnapd.naming import format_name
from tests.unit.command_line import (
    CONFIG,
    DEFAULT_HOST,
    DEFAULT_UUID,
    LAST_YEAR,
    THIS_YEAR,
    Capture,
    SharedHost,
    Write,
    answer,
    complaint,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.live_config import LiveConfig


def test_plan_shows_take_keep_and_delete(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(THIS_YEAR.year - ago, 1, 1, tzinfo=UTC)) for ago in (2, 1)]
    new = format_name("standard", THIS_YEAR)
    assert answer(capsys, "plan", "--config", write(CONFIG), "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {THIS_YEAR.isoformat()}\n"
        f"  take    {new}  internal, memory\n"
        f"  keep    {new}  last #1\n"
        f"  keep    {names[1]}  last #2\n"
        f"  delete  {names[0]}  last=2 used up\n"
        "Nothing was changed.\n"
    )
    assert len(shared_host.domain.listAllSnapshots(0)) == 2


def test_of_a_pair_with_nothing_due_the_next_run_is_planned(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    names = [shared_host.take(at) for at in (LAST_YEAR, THIS_YEAR)]
    next_year = datetime(THIS_YEAR.year + 1, 1, 1, tzinfo=UTC)
    assert answer(capsys, "plan", "--config", write(CONFIG), "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {next_year.isoformat()}\n"
        f"  take    {format_name('standard', next_year)}  internal, memory\n"
        f"  keep    {format_name('standard', next_year)}  last #1\n"
        f"  keep    {names[1]}  last #2\n"
        f"  delete  {names[0]}  last=2 used up\n"
        "Nothing was changed.\n"
    )


def test_plan_does_not_show_deletes_of_a_run_that_takes_nothing(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    for year in (2000, 2001, 2002):
        shared_host.take(datetime(year, 1, 1, tzinfo=UTC))
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    text = answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST)
    assert "  delete  " not in text


def test_plan_shows_a_refusal_with_its_reason(capsys: Capture, write: Write) -> None:
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    assert answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {THIS_YEAR.isoformat()}\n"
        "  refuse  unsupported: libvirt's test driver has no external snapshots; set kind: internal in the policy\n"
        "Nothing was changed.\n"
    )


def test_plan_shows_what_waits(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(2000 + n, 1, 1, tzinfo=UTC)) for n in range(4)]
    config = write(CONFIG.replace("splay", "max_deletes_per_run: 2, splay"))
    text = answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST)
    assert f"  waits   {names[0]}  fuse: 3 deletes at once are more than max_deletes_per_run: 2;" in text


def test_plan_as_json(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(THIS_YEAR.year - ago, 1, 1, tzinfo=UTC)) for ago in (2, 1)]
    new = format_name("standard", THIS_YEAR)
    arguments = ["plan", "--json", "--config", write(CONFIG), "--connect", DEFAULT_HOST]
    assert json.loads(answer(capsys, *arguments))["plans"] == [
        {
            "domain": "test",
            "domain_uuid": DEFAULT_UUID,
            "policy": "standard",
            "run_at": THIS_YEAR.isoformat(),
            "take": new,
            "consistency": "memory",
            "unchanged": None,
            "refusal": None,
            "verdicts": [
                {"snapshot": new, "keep": True, "reasons": ["last #1"]},
                {"snapshot": names[1], "keep": True, "reasons": ["last #2"]},
                {"snapshot": names[0], "keep": False, "reasons": ["last=2 used up"]},
            ],
            "room": [],
            "deletes": [names[0]],
            "blocked": [],
            "by_edit": [],
        }
    ]


def test_a_refusal_as_json(capsys: Capture, write: Write) -> None:
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    found = json.loads(answer(capsys, "plan", "--json", "--config", config, "--connect", DEFAULT_HOST))
    (plan,) = found["plans"]
    assert found["edit"] is None
    assert (plan["take"], plan["consistency"]) == (None, None)
    assert list(plan["refusal"]) == ["reason", "detail"]
    assert plan["refusal"]["reason"] == "unsupported"


# What an edit would change


def foreseen(capsys: Capture, path: str, *words: str) -> str:
    return answer(capsys, "plan", *words, "--config", path, "--connect", DEFAULT_HOST)


def edited(running: LiveConfig, name: str, *changes: tuple[str, str]) -> str:
    """Write the daemon's configuration to a file, with other words in it; return its path."""
    text = running.path.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path = running.path.parent / name
    path.write_text(text)
    return str(path)


def test_what_is_in_force_is_compared_with_nothing(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    shared_host.take(LAST_YEAR)
    assert foreseen(capsys, str(running.path)).startswith("test  policy standard, next run ")


def test_another_file_that_says_the_same_is_told_to_change_nothing(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    shared_host.take(LAST_YEAR)
    path = edited(running, "other.yaml", ("policies:", "# a comment\npolicies:"))
    first, *_ = foreseen(capsys, path).splitlines()
    assert first == f"{path} changes nothing of what the daemon has in force ({running.path})."


def test_deletes_that_only_the_edit_causes_are_marked(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    names = [shared_host.take(datetime(THIS_YEAR.year - ago, 1, 1, tzinfo=UTC)) for ago in (3, 2, 1)]
    path = edited(running, "other.yaml", ("last: 2", "last: 1"))
    text = foreseen(capsys, path)
    assert text.startswith(
        f"What {path} would change of what the daemon has had in force since {running.loaded_at.isoformat()}:\n"
        "  policy   standard: keep changed\n"
        "  domain   test: standard: keep changed\n"
        "  domain   test: standard: releases 1 snapshot(s) that stay now\n"
        "\n"
        "test  policy standard, next run "
    )
    assert f"  delete  {names[2]}  last=1 used up  <- only by the edit\n" in text
    assert f"  delete  {names[0]}  last=1 used up\n" in text
    found = json.loads(foreseen(capsys, path, "--json"))
    assert found["plans"][0]["by_edit"] == [names[2]]
    assert found["edit"]["policies"] == {"added": [], "removed": [], "changed": {"standard": ["keep"]}}
    assert found["edit"]["domains"][0]["releases"] == {"standard": 1}
    assert found["edit"]["in_force"]["path"] == str(running.path)


def test_the_daemons_own_file_is_compared_once_it_was_edited(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    shared_host.take(THIS_YEAR)
    running.path.write_text(running.path.read_text().replace("400d", "10d"))
    assert "  policy   standard: max_age changed\n" in foreseen(capsys, str(running.path))


def test_protection_that_is_lost_and_policies_that_come_and_go(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    shared_host.take(THIS_YEAR)
    path = edited(running, "other.yaml", ("standard: {", "other: {"), ("test: [standard]", '"db-*": [other]'))
    lines = foreseen(capsys, path).splitlines()
    assert lines[1:5] == [
        "  policy   other is new",
        "  policy   standard is gone",
        (
            "  domain   test: LOSES ITS PROTECTION: unprotected: no entry under domains fits it; "
            "give it policies, or [] if that is meant"
        ),
        "  domain   test: loses standard; 1 snapshot(s) stay, and nothing prunes them any more",
    ]
    more = "  more: {schedule: daily, keep: {last: 1}, kind: internal}\ndomains:"
    path = edited(running, "more.yaml", ("domains:", more), ("[standard]", "[standard, more]"))
    assert "  domain   test: gains more (" in foreseen(capsys, path)


def test_a_fuse_that_the_edit_would_blow_is_told(capsys: Capture, running: LiveConfig, shared_host: SharedHost) -> None:
    policy = ("keep: {last: 2}", "keep: {last: 9}")
    running.path.write_text(running.path.read_text().replace(*policy))
    running.replace(running.read() or running.current)
    for year in range(THIS_YEAR.year - 5, THIS_YEAR.year + 1):
        shared_host.take(datetime(year, 1, 1, tzinfo=UTC))
    path = edited(running, "other.yaml", ("last: 9}", "last: 1}, max_deletes_per_run: 2"))
    text = foreseen(capsys, path)
    waits = "they wait, since that is more than max_deletes_per_run"
    assert f"standard: releases 5 snapshot(s) that stay now; {waits}" in text
    assert text.count("<- only by the edit") == 6  # and the newest, of which the next run makes an older one


def test_what_needs_a_restart_and_files_that_are_missing_are_told(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost, tmp_path: Path
) -> None:
    shared_host.take(THIS_YEAR)
    part = running.path.parent / "conf.d" / "more.yaml"
    part.parent.mkdir()
    part.write_text("policies: {more: {schedule: daily, keep: {last: 1}}}\n")
    running.replace(running.read() or running.current)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "kvmsnapd.yaml"
    path.write_text(running.path.read_text() + "workers: 3\n")
    lines = foreseen(capsys, str(path)).splitlines()
    assert lines[1:4] == [
        f"  file     {part} is read by the daemon, and has no counterpart in conf.d beside {path}",
        "  restart  needed for workers",
        "  policy   more is gone",
    ]


def test_an_edit_that_is_wrong_is_refused_with_its_place(capsys: Capture, running: LiveConfig) -> None:
    path = edited(running, "other.yaml", ("last: 2", "lats: 2"))
    assert complaint(capsys, "plan", "--config", path, "--connect", DEFAULT_HOST, code=78).startswith(f"{path}:2:")
