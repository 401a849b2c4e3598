"""The note of what runs found: it outlives a restart, and a bad one never stops the daemon."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.findings import FindingsNote
from kvmsnapd.tally import DomainTally, Failures, PairTally, Tally
from tests.builders import NOW, OTHER_UUID, UUID

if TYPE_CHECKING:
    from pathlib import Path

KEY = f"{UUID}/standard"
FOUND = Tally(
    pairs={
        KEY: PairTally(
            failures=Failures(7, "agent", NOW - timedelta(hours=1), NOW),
            blocked={"fuse": 11},
            quarantine="disk",
        )
    },
    domains={UUID: DomainTally(frozen=True), OTHER_UUID: DomainTally(frozen=False)},
)


def test_what_was_found_is_known_after_a_restart(tmp_path: Path) -> None:
    FindingsNote(tmp_path).write(FOUND)
    assert FindingsNote(tmp_path).read() == FOUND


def test_counters_begin_anew_as_prometheus_expects_of_them(tmp_path: Path) -> None:
    FindingsNote(tmp_path).write(Tally(pairs={KEY: PairTally(taken={"crash": 3}, deleted=2)}))
    assert FindingsNote(tmp_path).read() == Tally()


def test_without_a_note_nothing_is_known(tmp_path: Path) -> None:
    assert FindingsNote(tmp_path).read() == Tally()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 1, "pairs": [], "frozen": {}}',
        '{"version": 1, "pairs": {"a/b": {"failures": [1, "x"]}}, "frozen": {}}',
        '{"version": 1, "pairs": {"a/b": {"failures": [1, "x", "2026-11-22", "2026-11-22"]}}, "frozen": {}}',
        '{"version": 1, "pairs": {"a/b": {"blocked": {"fuse": "many"}}}, "frozen": {}}',
        '{"version": 1, "pairs": {"a/b": {"quarantine": ["disk"]}}, "frozen": {}}',
        '{"version": 1, "pairs": {"a/b": {"blocked": {"\\ud800": 1}}}, "frozen": {}}',
        "\x00\xff",
    ],
)
def test_a_note_that_cannot_be_understood_is_left_aside_and_told(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "findings.json").write_text(text, encoding="latin-1")
    note = FindingsNote(tmp_path)
    assert note.read() == Tally()
    assert "findings.json" in caplog.text
    note.write(FOUND)
    assert FindingsNote(tmp_path).read() == FOUND


def test_a_note_of_another_version_is_left_aside(tmp_path: Path) -> None:
    (tmp_path / "findings.json").write_text('{"version": 2, "anything": 1}')
    assert FindingsNote(tmp_path).read() == Tally()


def test_the_file_is_written_only_when_something_has_changed(tmp_path: Path) -> None:
    note = FindingsNote(tmp_path)
    note.write(Tally())
    before = (tmp_path / "findings.json").stat().st_ino
    note.write(Tally(pairs={KEY: PairTally(taken={"crash": 3})}))
    assert (tmp_path / "findings.json").stat().st_ino == before
    note.write(FOUND)
    assert json.loads((tmp_path / "findings.json").read_text())["pairs"]


def test_a_note_that_cannot_be_written_stops_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "gone"
    note = FindingsNote(directory)
    note.write(FOUND)
    note.write(FOUND)
    assert caplog.text.count("not kept over a restart") == 1
    directory.mkdir()
    note.write(FOUND)
    assert FindingsNote(directory).read() == FOUND
