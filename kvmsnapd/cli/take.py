"""``kvmsnapd take``: a snapshot now, as the daemon would take it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmsnapd.cli.find import find_domain
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import InvalidValueError, shown
from kvmsnapd.execute import Result
from kvmsnapd.fleet import survey
from kvmsnapd.model import Hold

if TYPE_CHECKING:
    import argparse

    from kvmsnapd.cli.work import Bench
    from kvmsnapd.execute import Outcome
    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Inventory


def take(arguments: argparse.Namespace) -> int:
    """Take one snapshot of each domain, one after the other; 1 if one of them did not get its."""
    if arguments.hold is not None and not arguments.hold.strip():
        msg = "--hold needs a reason, for whoever finds it"
        raise InvalidValueError(msg)
    hold = Hold(arguments.hold.strip()) if arguments.hold else None
    with bench(arguments) as work:
        domains = {d.uuid: d for d in (find_domain(work.fleet.domains, word) for word in arguments.domains)}
        pairs = [_choose(work, domain, arguments.policy) for domain in domains.values()]
        results = work.finish(lambda: _take_each(work, pairs, hold))
        if arguments.json:
            print(json.dumps([_object(work, pair, outcome) for pair, outcome in results], indent=2))
        done = [outcome.result in {Result.TAKEN, Result.UNCHANGED} for _, outcome in results]
        return work.exit_code(failed=len(done) < len(pairs) or not all(done))


def _take_each(work: Bench, pairs: list[Pair], hold: Hold | None) -> list[tuple[Pair, Outcome]]:
    results = []
    for pair in pairs:
        if not work.wanted():
            break
        outcome = work.executor.take(pair, hold=hold)
        results.append((pair, outcome))
        if not work.json:
            _tell(work, pair, outcome, hold)
    return results


def _tell(work: Bench, pair: Pair, outcome: Outcome, hold: Hold | None) -> None:
    name = pair.name.domain
    if outcome.result is Result.UNCHANGED:
        before = next((s.mark.hold for s in pair.snapshots if s.name == outcome.snapshot and s.mark), None)
        held = f"; it is now held: {hold.reason}" if hold else ""
        was = f" (before: {before.reason})" if hold and before and before.reason != hold.reason else ""
        print(
            f"{name}: shut off and not changed since {outcome.snapshot}, which holds exactly this state; no other was "
            f"taken{held}{was}"
        )
    elif outcome.result is Result.TAKEN and hold:
        print(f"{name}: it stays until `kvmsnapd release {name} {outcome.snapshot}`")
    if outcome.result is Result.TAKEN and not _applies(work, pair):
        print(
            f"{name}: policy {pair.name.policy} does not apply to it, so nothing prunes this snapshot; "
            f"`kvmsnapd forget {name} --policy {pair.name.policy}` deletes it",
            file=sys.stderr,
        )


def _applies(work: Bench, pair: Pair) -> bool:
    return any(known.name == pair.name for known in work.fleet.pairs)


def _object(work: Bench, pair: Pair, outcome: Outcome) -> dict[str, Any]:
    return {
        "domain": pair.name.domain,
        "domain_uuid": pair.name.domain_uuid,
        "policy": pair.name.policy,
        "policy_applies": _applies(work, pair),
        "result": str(outcome.result),
        "snapshot": outcome.snapshot,
        "said": work.lines(pair.name.domain_uuid),
    }


def _choose(work: Bench, domain: Inventory, word: str | None) -> Pair:
    """Return the domain with the policy that is meant.

    Raises:
        InvalidValueError: none or several would do, or the one that is named cannot.
    """
    own = [pair for pair in work.fleet.pairs if pair.name.domain_uuid == domain.uuid]
    known = ", ".join(work.config.policies) or "none"
    if word is None:
        if len(own) == 1:
            return own[0]
        if own:
            names = ", ".join(pair.name.policy for pair in own)
            msg = f"{domain.name} has the policies {names}; say which with --policy"
        else:
            msg = f"{domain.name} has no policy; name one with --policy (configured: {known})"
        raise InvalidValueError(msg)
    named = next((pair for pair in own if pair.name.policy == word), None)
    if named:
        return named
    policy = work.config.policies.get(word)
    if policy is None:
        msg = f"no policy {shown(word)} is configured; there is {known}"
        raise InvalidValueError(msg)
    other = next((pair for pair in own if pair.policy.kind is not policy.kind), None)
    if other:
        msg = (
            f"policy {word} takes {policy.kind} snapshots, and {domain.name} has policy {other.name.policy}, which "
            f"takes {other.policy.kind} ones; a domain that has both kinds is not snapshotted any more"
        )
        raise InvalidValueError(msg)
    (pair,) = survey([word], {domain.uuid: (policy,)}, [domain], now=read_clock()).pairs
    return replace(pair, policies=(policy,))
