"""How far work is, as a person sees it."""

from __future__ import annotations

import io
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.cli import progress as module
from kvmsnapd.cli.progress import progress
from kvmsnapd.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20


class Terminal(io.StringIO):
    """A screen."""

    def isatty(self) -> bool:
        return True


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let stderr be a terminal; to be called in the test itself, as pytest has its own until then."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    return screen


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("SHOWN_AFTER_SECONDS", 0.1),
        ("_MEASURED_EVERY_SECONDS", 0.02),
        ("_TOLD_EVERY_SECONDS", 0.1),
    ):
        monkeypatch.setattr(module, name, seconds)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_done_soon_shows_nothing_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    with progress("deleting x", lambda: asked.append(1)):  # type: ignore[func-returns-value]
        pass
    assert (capsys.readouterr().err, asked) == ("", [])


def test_a_bar_shows_bytes_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with progress("deleting [x]", lambda: (3 * MIB, 12 * MIB)):
        wait_for(lambda: "3.0/12.0 MiB" in screen.getvalue())
    assert "deleting [x]" in screen.getvalue()


def test_elsewhere_a_line_comes_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""

    def look() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return said.count("\n") >= 2

    with progress("deleting x", lambda: (3 * MIB, 12 * MIB)):
        wait_for(look)
    assert set(said.splitlines()) == {"deleting x: 25 % (3 of 12 MiB), 0s so far"}


def unknown() -> None:
    return None


def refused() -> None:
    msg = "no"
    raise HypervisorError(msg, operation="progress")


@pytest.mark.parametrize("measure", [None, unknown, refused, lambda: (0, 0)])
def test_where_nothing_is_known_the_time_is_shown(
    capsys: pytest.CaptureFixture[str], measure: Callable[[], tuple[int, int] | None] | None
) -> None:
    said: list[str] = []
    with progress("deleting x", measure):
        wait_for(lambda: said.append(capsys.readouterr().err) or said[-1])
    assert "".join(said).startswith("deleting x: 0s so far\n")


def test_with_json_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with progress("deleting x", lambda: (1, 2), quiet=True):
        time.sleep(0.3)
    assert screen.getvalue() == ""


def test_a_measure_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    hung = threading.Event()
    began = time.monotonic()
    with progress("deleting x", lambda: hung.wait(30) and None):
        wait_for(lambda: "deleting x" in screen.getvalue())
    assert time.monotonic() - began < 5
    hung.set()


def test_what_the_work_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with pytest.raises(KeyError), progress("deleting x"):
        raise KeyError
    assert screen.getvalue() == ""
