"""The configuration in force: what is read and refused, when an edit has settled, and what others are told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from kvmsnapd.errors import ConfigError, KvmsnapdError
from kvmsnapd.live_config import LiveConfig, read_note
from tests.builders import NOW

GOOD = "policies: {p: {schedule: hourly, keep: {last: 2}}}\n"
OTHER = "policies: {p: {schedule: hourly, keep: {last: 3}}}\n"
BROKEN = "policies: {p: {schedule: hourly, keep: {}}}\n"


class Bench:
    """A configuration in force, its file, and a clock that tests move."""

    def __init__(self, directory: Path, *, watch: bool = True) -> None:
        self.now = NOW
        self.path = directory / "kvmsnapd.yaml"
        self._more = f"runtime_directory: {directory}\nwatch: {str(watch).lower()}\n"
        self.note = directory / "config.json"
        self.write(GOOD)
        self.live = LiveConfig(self.path, clock=lambda: self.now)

    def write(self, policies: str) -> None:
        self.path.write_text(policies + self._more)

    def write_part(self, policies: str, name: str = "more.yaml") -> Path:
        """Write a file of conf.d."""
        part = self.path.parent / "conf.d" / name
        part.parent.mkdir(exist_ok=True)
        part.write_text(policies)
        return part

    def reload(self) -> bool:
        """Read and replace as the daemon does; return whether it was accepted."""
        try:
            config = self.live.read()
        except ConfigError:
            return False
        self.live.replace(config)
        return True


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def kept(live: LiveConfig) -> int | None:
    """Return how many snapshots the policy in force keeps."""
    return live.current.policies["p"].keep.last


# Read and replace


def test_what_is_read_is_not_in_force_before_it_replaces_the_other(bench: Bench) -> None:
    before = bench.live.current
    bench.write(OTHER)
    config = bench.live.read()
    assert bench.live.current is before
    bench.now += timedelta(hours=1)
    bench.live.replace(config)
    assert (bench.live.current, bench.live.loaded_at) == (config, NOW + timedelta(hours=1))


@pytest.mark.parametrize("content", [BROKEN, "policies: [", "\0", "nonsense: 1\n"])
def test_what_is_refused_leaves_all_as_it_was_but_is_noted(bench: Bench, content: str) -> None:
    before, loaded_at = bench.live.current, bench.live.loaded_at
    bench.write(content)
    bench.now += timedelta(hours=1)
    with pytest.raises(ConfigError) as refusal:
        bench.live.read()
    assert (bench.live.current, bench.live.loaded_at) == (before, loaded_at)
    assert "\n".join(bench.live.rejected) == str(refusal.value)
    assert bench.live.stale


def test_a_file_that_is_gone_is_refused_and_noted(bench: Bench) -> None:
    bench.path.unlink()
    assert not bench.reload()
    assert "cannot be read" in bench.live.rejected[0]
    assert kept(bench.live) == 2


def test_the_next_good_one_clears_the_refusal(bench: Bench) -> None:
    bench.write(BROKEN)
    assert not bench.reload()
    bench.write(OTHER)
    assert bench.reload()
    assert (bench.live.rejected, bench.live.stale, kept(bench.live)) == ((), False, 3)


def test_no_configuration_to_begin_with_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        LiveConfig(tmp_path / "none.yaml", clock=lambda: NOW)


# Look


LOOKS = 5
"""More than an edit needs to settle."""


def asks(bench: Bench) -> bool:
    """Tell whether an edit is to be loaded before long; never at the first look at it."""
    assert not bench.live.look()
    return any(bench.live.look() for _ in range(LOOKS))


def test_nothing_is_to_be_loaded_as_long_as_nothing_is_edited(bench: Bench) -> None:
    assert not asks(bench)
    assert not bench.live.stale


def test_an_edit_is_to_be_loaded_once_it_has_settled(bench: Bench) -> None:
    bench.write(OTHER)
    assert asks(bench)
    assert bench.live.stale
    assert bench.reload()
    assert not asks(bench)
    assert not bench.live.stale


def test_a_file_that_changes_from_look_to_look_is_left_alone(bench: Bench) -> None:
    for size in range(1, 6):
        bench.write(OTHER + "#" * size + "\n")
        assert not bench.live.look()
    assert any(bench.live.look() for _ in range(LOOKS))


def test_a_file_that_is_half_written_at_one_look_only_is_never_to_be_loaded(bench: Bench) -> None:
    bench.write(OTHER[:30])
    assert not bench.live.look()
    bench.write(OTHER)
    assert asks(bench)


def test_an_edit_that_was_refused_is_not_tried_again_before_it_changes(bench: Bench) -> None:
    bench.write(BROKEN)
    assert asks(bench)
    assert not bench.reload()
    assert not asks(bench)
    assert bench.live.stale
    bench.write(BROKEN + "# more\n")
    assert asks(bench)


def test_an_edit_that_was_refused_by_hand_is_not_refused_once_more_by_itself(bench: Bench) -> None:
    bench.write(BROKEN)
    assert not bench.reload()
    assert not asks(bench)


def test_what_was_written_while_the_refused_one_was_read_is_tried(bench: Bench) -> None:
    bench.write(BROKEN)
    assert not bench.reload()
    bench.write(OTHER)
    assert asks(bench)
    assert bench.reload()


def test_an_edit_that_was_undone_before_it_settled_is_forgotten(bench: Bench) -> None:
    bench.write(OTHER)
    assert not bench.live.look()
    bench.write(GOOD)
    assert not asks(bench)
    assert not bench.live.stale


def test_a_refused_edit_that_is_undone_is_read_once_more_so_that_the_refusal_ends(bench: Bench) -> None:
    bench.write(BROKEN)
    assert not bench.reload()
    bench.write(GOOD)
    for _ in range(LOOKS):
        if bench.live.look():
            assert bench.reload()
    assert bench.live.rejected == ()
    assert not asks(bench)


def test_files_of_conf_d_that_come_change_and_go_are_edits(bench: Bench) -> None:
    part = bench.write_part("policies: {q: {schedule: daily, keep: {last: 1}}}\n")
    assert asks(bench)
    assert bench.reload()
    part.write_text("policies: {r: {schedule: daily, keep: {last: 1}}}\n")
    assert asks(bench)
    assert bench.reload()
    assert set(bench.live.current.policies) == {"p", "r"}
    part.unlink()
    assert asks(bench)
    assert bench.reload()
    assert set(bench.live.current.policies) == {"p"}


def test_files_that_are_not_read_are_no_edits(bench: Bench) -> None:
    for name in (".#more.yaml", "more.yaml~", "more.yaml.dpkg-new", "more.yml"):
        bench.write_part("nonsense", name)
    os.utime(bench.path, (0, 0))
    assert not asks(bench)
    assert not bench.live.stale


def test_a_file_that_is_gone_is_an_edit_too(bench: Bench) -> None:
    bench.path.unlink()
    assert asks(bench)
    assert not bench.reload()
    assert not asks(bench)
    assert bench.live.stale


def test_without_watch_nothing_is_to_be_loaded_but_an_edit_is_known(tmp_path: Path) -> None:
    bench = Bench(tmp_path, watch=False)
    bench.write(OTHER)
    assert not asks(bench)
    assert bench.live.stale
    bench.write(GOOD)
    assert not bench.live.look()
    assert not bench.live.stale


def test_what_settled_before_watch_was_switched_on_is_seen_afterwards(tmp_path: Path) -> None:
    bench = Bench(tmp_path, watch=False)
    bench.path.write_text(bench.path.read_text().replace("watch: false", "watch: true"))
    assert not asks(bench)
    assert bench.reload()
    bench.path.write_text(bench.path.read_text().replace("last: 2", "last: 3"))
    assert asks(bench)


def test_a_file_that_changed_since_it_was_looked_at_is_left_to_the_next_look(bench: Bench) -> None:
    bench.write(OTHER)
    assert asks(bench)
    bench.write(GOOD + "timezone: Europe/Berlin\n")
    assert bench.live.read(asked=False) is None
    assert asks(bench)
    assert bench.live.read(asked=False)


def test_a_link_that_leads_to_itself_is_refused_and_ends_nothing(bench: Bench) -> None:
    bench.live.be_the_only_one()
    bench.path.unlink()
    bench.path.symlink_to(bench.path.name)
    with pytest.raises(ConfigError, match="cannot be read"):
        bench.live.read()
    assert bench.live.rejected
    bench.live.look()


# The note for other processes


@pytest.fixture
def told(bench: Bench) -> Bench:
    """Provide one whose note is written, as that of a daemon that runs."""
    bench.live.be_the_only_one()
    return bench


def test_the_note_tells_what_is_in_force_and_what_was_refused(told: Bench, tmp_path: Path) -> None:
    note = read_note(told.path, tmp_path)
    assert note
    assert (note["pid"], note["loaded_at"], note["rejected"]) == (os.getpid(), NOW.isoformat(), [])
    told.now += timedelta(hours=1)
    told.write(BROKEN)
    assert not told.reload()
    assert read_note(told.path, tmp_path) == note | {"rejected": list(told.live.rejected)}
    told.write(OTHER)
    assert told.reload()
    note = read_note(told.path, tmp_path)
    assert note
    assert (note["loaded_at"], note["rejected"]) == (told.now.isoformat(), [])


def test_a_second_daemon_beside_it_is_refused(told: Bench) -> None:
    other = LiveConfig(told.path, clock=lambda: NOW)
    with pytest.raises(KvmsnapdError, match="another kvmsnapd uses"):
        other.be_the_only_one()


def test_somebody_who_reads_the_note_does_not_keep_a_daemon_from_starting(bench: Bench, tmp_path: Path) -> None:
    with (tmp_path / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        reader = threading.Timer(0.2, fcntl.flock, [lock, fcntl.LOCK_UN])
        reader.start()
        try:
            bench.live.be_the_only_one()
        finally:
            reader.join()


def test_the_note_stays_where_it_was_when_an_edit_names_another_directory(told: Bench, tmp_path: Path) -> None:
    told.path.write_text(f"{GOOD}runtime_directory: {tmp_path}/elsewhere\n")
    assert told.reload()
    assert read_note(told.path, tmp_path) is not None


def test_a_note_of_another_file_is_not_believed(told: Bench, tmp_path: Path) -> None:
    assert told.note.exists()
    assert read_note(tmp_path / "other.yaml", tmp_path) is None


def test_a_note_is_found_by_any_path_of_the_file(told: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.yaml").symlink_to(told.path)
    (tmp_path / "folder").mkdir()
    for path in (told.path.name, "./folder/../kvmsnapd.yaml", "link.yaml"):
        assert read_note(Path(path), tmp_path) is not None, path


def test_a_note_of_a_process_that_has_died_is_not_believed(bench: Bench, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from kvmsnapd.daemon import read_clock;"
        "from kvmsnapd.live_config import LiveConfig;"
        "LiveConfig(Path(sys.argv[1]), clock=read_clock).be_the_only_one(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(bench.path)], check=False).returncode == -9
    assert json.loads(bench.note.read_text())["pid"]
    assert read_note(bench.path, tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "{}", '{"path": "x"}', "\0", "[]", "null", '{"pid": null}'])
def test_a_note_that_is_broken_is_none(told: Bench, tmp_path: Path, content: str) -> None:
    told.note.write_text(content)
    assert read_note(told.path, tmp_path) is None


def test_a_note_of_another_version_is_not_guessed_at(told: Bench, tmp_path: Path) -> None:
    note = json.loads(told.note.read_text())
    told.note.write_text(json.dumps(note | {"version": 99}))
    with pytest.raises(KvmsnapdError, match="of another version than this command"):
        read_note(told.path, tmp_path)


def test_a_disk_without_room_for_the_note_is_no_reason_to_stop(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    (tmp_path / "config.json.new").mkdir()
    bench.live.be_the_only_one()
    assert bench.reload()
    assert read_note(bench.path, tmp_path) is None
