"""``kvmsnapd restore``: go back to a snapshot in place; with ``--as`` a second domain is made instead."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from kvmsnapd.cli.ask import agrees
from kvmsnapd.cli.copy import copy_domain
from kvmsnapd.cli.find import find_domain, find_snapshot
from kvmsnapd.cli.progress import progress
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.durations import rough_duration
from kvmsnapd.errors import InvalidValueError
from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import DomainState, Kind, PairName
from kvmsnapd.restore import needs_power_off
from kvmsnapd.restorer import Restorer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from kvmsnapd.cli.work import Bench
    from kvmsnapd.model import Domain
    from kvmsnapd.restore import RestorePlan
    from kvmsnapd.restorer import Measure


def restore(arguments: argparse.Namespace) -> int:
    """Show what going back means, ask, and go back; or do the other forms of the command."""
    if arguments.as_name:
        return copy_domain(arguments)
    if arguments.linked or arguments.network:
        msg = "--linked and --network say how a second domain is made: give it a name with --as NAME"
        raise InvalidValueError(msg)
    with bench(arguments) as work:
        domain = find_domain(work.fleet.domains, arguments.domain)
        snapshot = find_snapshot(domain, arguments.snapshot)
        name = PairName(domain.name, domain.uuid, snapshot.mark.policy if snapshot.mark else "-")
        restorer = _restorer(work)
        if arguments.abandon:
            with work.locked(name, f"taking a restore to {snapshot.name} back"):
                restorer.abandon(domain.uuid, snapshot.name)
            _tell(work, f"{domain.name} stays as it is; the restore to {snapshot.name} is taken back")
            return 0
        with work.locked(name, f"looking at {snapshot.name}"):  # a copy that is gone must not be in the way
            drop_gone_links(work.host, work.host.domain(domain.uuid))
        seen, plan = restorer.plan(domain.uuid, snapshot.name, discard=arguments.discard_current)
        need = restorer.copy_size(seen, plan)
        if not work.json:
            print("\n".join(_lines(seen, plan, need, arguments)))
        if not agrees(f"Go back to {snapshot.name}?", yes=arguments.yes):
            print("Nothing was changed.")
            return 0
        lost = [s.name for s in plan.lost]
        with work.locked(name, f"restoring {snapshot.name}"):
            kept = work.finish(
                lambda: restorer.restore(
                    domain.uuid,
                    snapshot.name,
                    agreed=lost,
                    discard=arguments.discard_current,
                    power_off=arguments.power_off,
                    start=arguments.start,
                )
            )
        now = work.host.domain(domain.uuid)
        if work.json:
            answer = {"domain": now.name, "snapshot": snapshot.name, "kept": kept, "lost": lost, "state": now.state}
            print(json.dumps(answer, indent=2))
        elif kept:
            print(f"To look into what was before: kvmsnapd restore {now.name} {kept} --as NAME")
            print(f"When it is no longer needed:  kvmsnapd release {now.name} {kept}")
        return work.exit_code(failed=False)


def _restorer(work: Bench) -> Restorer:
    def show(what: str, measure: Measure) -> AbstractContextManager[None]:
        return progress(what, measure, quiet=work.json)

    return Restorer(work.host, read_clock, say=lambda text: _tell(work, text), progress=show, wanted=work.wanted)


def _tell(work: Bench, text: str) -> None:
    if not work.json:
        print(text, flush=True)


def _lines(domain: Domain, plan: RestorePlan, need: Mapping[str, int], arguments: argparse.Namespace) -> Iterator[str]:
    """Yield what is going to happen, for a person who is to agree to it."""
    mark, age = plan.mark, rough_duration(read_clock() - plan.mark.taken_at)
    yield f"{domain.name} goes back to {plan.target.name}, taken {age} ago ({mark.kind}, {mark.consistency})"
    if plan.resumed:
        yield "  again   an earlier restore to it was cut off; this one finishes it"
    if needs_power_off(domain, plan):
        how = "; powered off if it does not" if arguments.power_off else ""
        yield f"  stop    the guest, which {domain.state_detail.replace('running', 'runs')}, is shut down first{how}"
    if plan.keep:
        size = f", a copy of up to {sum(need.values()) / 2**20:.0f} MiB in {', '.join(need)}" if need else ""
        yield f"  keep    the present state as {plan.keep.name}, held{size}"
    elif plan.kept:
        yield f"  kept    the present state is there already as {plan.kept}, held"
    elif not plan.switched:
        yield "  lose    the present state: all that was written since the newest snapshot"
    for snapshot in plan.lost:
        yield f"  lose    {snapshot.name}, which is newer"
    for target in plan.others:
        yield f"  leave   {target}, which is not part of the snapshot, as it is"
    for path in plan.unused:
        yield f"  leave   {path}, which the domain no longer uses then"
    ram = plan.target.memory_file is not None or (plan.target.kind is Kind.INTERNAL and not plan.target.offline)
    running = domain.state is not DomainState.SHUT_OFF or ram
    if arguments.start if arguments.start is not None else running:
        yield f"  start   the guest{', with its RAM of then' if ram else ''}"
    else:
        yield "  leave   the guest shut off"
    sys.stdout.flush()
