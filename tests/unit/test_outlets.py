"""What the outside is shown between runs: files for others, and a second look at what runs have found."""

from __future__ import annotations

import logging
import stat
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.config import load_config
from kvmsnapd.errors import GuestFrozenError, HypervisorUnreachableError
from kvmsnapd.events import DomainExamined, Event, GuestFrozen, GuestUnfrozen
from kvmsnapd.fleet import survey
from kvmsnapd.model import DomainState, PairName, Storage
from kvmsnapd.outlets import Outlets
from kvmsnapd.series import Observation
from tests.builders import NOW, UUID, a_domain, a_policy
from tests.fakes import FakeHypervisor, raising

if TYPE_CHECKING:
    from pathlib import Path

PAIR = PairName("web1", UUID, "standard")


class Bench:
    """The outlets of a daemon that writes a textfile and opens no port."""

    def __init__(self, directory: Path, state: DomainState = DomainState.RUNNING) -> None:
        self.textfile = directory / "kvmsnapd.prom"
        path = directory / "kvmsnapd.yaml"
        path.write_text(
            f"domains: {{}}\nstate_directory: {directory}\n"
            f"metrics: {{enabled: false, textfile: {self.textfile}}}\nlog: {{level: error}}\n"
        )
        self.fake = FakeHypervisor()
        self.domain = self.fake.add(a_domain(state=state))
        self.fleet = survey(["standard"], {"web1": (a_policy(),)}, [self.domain], now=NOW)
        self.events: list[Event] = []
        seen = Observation(fleet=self.fleet, libvirt_up=True, last_tick_at=NOW)
        self.outlets = Outlets(load_config(path), lambda: seen, ready=lambda: True, watch=self.events.append)

    def look_again(self) -> None:
        self.outlets.look_again(self.fake, self.fleet)

    def written(self, series: str) -> str | None:
        """Return a series' value as it stands in the textfile."""
        self.outlets.after_tick()
        lines = self.textfile.read_text().splitlines()
        return next((line.rpartition(" ")[2] for line in lines if line.startswith(f"kvmsnapd_{series}")), None)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_textfile_can_be_read_by_node_exporter_and_leaves_nothing_beside_it(bench: Bench) -> None:
    assert bench.written("libvirt_up") == "1.0"
    assert stat.S_IMODE(bench.textfile.stat().st_mode) == 0o644
    assert [path.name for path in bench.textfile.parent.glob("*kvmsnapd*")].count("kvmsnapd.new") == 0
    assert "process_" not in bench.textfile.read_text()  # node_exporter has its own


def test_a_textfile_that_cannot_be_written_is_told_once_and_stops_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.textfile.mkdir()
    with caplog.at_level(logging.ERROR):
        bench.outlets.after_tick()
        bench.outlets.after_tick()
    assert len(caplog.records) == 1
    assert f"metrics.textfile {bench.textfile} cannot be written: Is a directory" in caplog.text


def test_free_space_is_looked_at_again_in_the_folders_that_runs_have_named(bench: Bench) -> None:
    bench.outlets.publish(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/images": 100}))
    bench.fake.stored = Storage({"/images": 7})
    bench.look_again()
    assert bench.written('storage_free_bytes{storage="/images"}') == "7.0"
    bench.fake.before["free_bytes"] = [raising(HypervisorUnreachableError("gone", operation="storage"))]
    bench.look_again()
    assert bench.written('storage_free_bytes{storage="/images"}') == "7.0"


def test_a_frozen_guest_is_asked_again_until_it_answers(bench: Bench) -> None:
    bench.outlets.publish(GuestFrozen(pair=PAIR, error="a sentence"))
    bench.fake.before["filesystems"] = [raising(GuestFrozenError("frozen", operation="filesystems"))]
    bench.look_again()
    assert bench.written("guest_frozen") == "1.0"
    bench.look_again()
    assert bench.written("guest_frozen") == "0.0"
    bench.look_again()
    assert [event for event in bench.events if isinstance(event, GuestUnfrozen)] == [
        GuestUnfrozen(domain="web1", domain_uuid=UUID)
    ]


def test_a_frozen_guest_that_was_shut_off_is_not_frozen_any_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DomainState.SHUT_OFF)
    bench.outlets.publish(GuestFrozen(pair=PAIR, error="a sentence"))
    bench.look_again()
    assert bench.written("guest_frozen") == "0.0"


def test_guests_that_were_never_found_frozen_are_not_asked(bench: Bench) -> None:
    bench.look_again()
    assert bench.fake.calls == []
