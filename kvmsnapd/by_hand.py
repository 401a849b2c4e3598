"""Deletes that a person has looked at: what retention releases, without fuse, or all of ours that a domain has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.links import drop_gone_links
from kvmsnapd.plan import plan_forget, plan_prune
from kvmsnapd.prune import Blocked, BlockReason

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kvmsnapd.execute import Executor
    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Domain, PairName
    from kvmsnapd.prune import Delete


@dataclass(frozen=True)
class Done:
    """What came of it: how many were deleted, and which of those that were shown are still there, and why."""

    deleted: int
    left: tuple[Blocked, ...]


@dataclass(frozen=True)
class ByHand:
    """Carries deletes out through an executor: under its locks, each looked at just before and just after."""

    executor: Executor

    def prune(self, pair: Pair, shown: Collection[str]) -> Done:
        """Delete what retention releases, as far as a person has been shown it; planned anew under the lock.

        Raises:
            DomainLockedError: another process works on the domain, and did not end within the time to wait.
            HypervisorError: the domain cannot be read. A delete that fails is an event, and is left.
        """
        executor = self.executor
        with executor.locked(pair.name, f"prune of {pair.name.policy}"):
            domain = self._read(pair.name)
            capabilities = executor.hypervisor.capabilities()
            plan = plan_prune(domain, pair.policy, capabilities, now=executor.clock())
            steps = _only(plan[0], shown)
            deleted, blocked = executor.pruner.delete_released(pair, steps)
            return _done(domain, deleted, [*blocked, *plan[1]], steps, shown)

    def forget(self, name: PairName, shown: Collection[str], *, policy: str | None = None) -> Done:
        """Delete a domain's own snapshots, held ones and the newest too, as far as a person has been shown them.

        Args:
            name: the domain; its policy is for the events alone.
            policy: only the snapshots of this one.

        Raises:
            DomainLockedError, HypervisorError: as above.
        """
        executor = self.executor

        def may_go(_domain: Domain, snapshot: str) -> Blocked | None:
            return None if executor.wanted() else Blocked(snapshot, BlockReason.CHANGED, "stopped before it")

        with executor.locked(name, "forget"):
            domain = self._read(name)
            plan = plan_forget(domain, executor.hypervisor.capabilities(), policy=policy)
            steps = _only(plan[0], shown)
            deleted, blocked = executor.pruner.delete_each(name, steps, may_go)
            return _done(domain, deleted, [*blocked, *plan[1]], steps, shown)

    def _read(self, name: PairName) -> Domain:
        return drop_gone_links(self.executor.hypervisor, self.executor.hypervisor.domain(name.domain_uuid))


def _only(steps: Sequence[Delete], shown: Collection[str]) -> list[Delete]:
    return [step for step in steps if step.snapshot in shown]


def _done(
    domain: Domain, deleted: int, blocked: Sequence[Blocked], steps: Sequence[Delete], shown: Collection[str]
) -> Done:
    left = [wait for wait in blocked if wait.snapshot in shown]
    told = {step.snapshot for step in steps} | {wait.snapshot for wait in left}
    wanted = [s.name for s in domain.snapshots if s.name in shown and s.name not in told]
    left += [Blocked(name, BlockReason.CHANGED, "retention keeps it now") for name in wanted]
    return Done(deleted, tuple(left))
