"""``kvmsnapd verify``: boot a throw-away copy of a snapshot and see whether it comes up."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from kvmsnapd.cli.find import NEWEST, find_domain, find_snapshot
from kvmsnapd.cli.progress import progress
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.driller import Driller
from kvmsnapd.durations import format_duration
from kvmsnapd.model import PairName
from kvmsnapd.policy import DrillRules

if TYPE_CHECKING:
    import argparse
    from contextlib import AbstractContextManager

    from kvmsnapd.events import Event


def verify(arguments: argparse.Namespace) -> int:
    """Try one snapshot; exit with 1 if its copy did not come up."""
    with bench(arguments) as work:
        domain = find_domain(work.fleet.domains, arguments.domain)
        snapshot = find_snapshot(domain, arguments.snapshot or NEWEST)
        policy = snapshot.mark.policy if snapshot.mark else "-"
        pair = PairName(domain.name, domain.uuid, policy)
        of_pair = [p.policy.drill for p in work.fleet.pairs if p.name.key == pair.key]
        rules = of_pair[0] if of_pair else DrillRules()

        def show(what: str) -> AbstractContextManager[None]:
            return progress(what, None, quiet=work.json)

        def keep(_event: Event) -> None:
            """Say nothing: the answer has all that is in the event."""

        driller = Driller(
            work.host,
            keep,
            read_clock,
            lambda name: work.locked(name, f"drill of {snapshot.name}"),
            lambda uuid: work.locks.reading(uuid, wanted=work.wanted),
            wanted=work.wanted,
            progress=show,
        )
        if not work.json:
            print(
                f"{domain.name}: booting a copy of {snapshot.name}, for {format_duration(rules.deadline)} at the most"
            )
        drill = work.finish(lambda: driller.drill(pair, snapshot.name, rules))
        if work.json:
            answer = {"domain": domain.name, "snapshot": snapshot.name} | dataclasses.asdict(drill)
            print(json.dumps(answer, indent=2, default=str))
        elif drill.failure is None:
            print(f"{domain.name}: the copy came up, and is gone again: {snapshot.name} is a way back")
        else:
            print(
                f"{domain.name}: {snapshot.name} is no way back as it is: {drill.failure}. The domain was not touched"
            )
        return work.exit_code(failed=drill.failure is not None)
