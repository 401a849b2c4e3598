"""Copy what a snapshot froze: as files, as a second domain, or as a thin one that stands on it."""

from __future__ import annotations

import uuid
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvmsnapd.copies import CopyPlan, plan_copy
from kvmsnapd.errors import (
    CopyRefusedError,
    HypervisorError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)
from kvmsnapd.model import DomainState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, Snapshot
    from kvmsnapd.state_files import DomainLocks

    Measure = Callable[[], tuple[int, int] | None]


def layers_of(hypervisor: Hypervisor, domain: Domain, path: str) -> list[str]:
    """Return a file and all below it, as far as the domain's XML or, of one that is off, its storage tells."""
    for disk in domain.disks:
        chain = [disk.path or "", *disk.backing]
        if path in chain:
            found = chain[chain.index(path) :]
            break
    else:
        found = [path]
    if domain.state is DomainState.SHUT_OFF:
        below = {layer.path: layer.backing for layer in hypervisor.storage(domain, ()).layers.values()}
        while (at := below.get(found[-1])) and at not in found:
            found.append(at)
    return found


def copy_bytes(
    hypervisor: Hypervisor, domain: Domain, sources: Mapping[str, str], files: Mapping[str, str]
) -> dict[str, int]:
    """Return, by folder, how many bytes stand-alone copies of these files take at the most.

    Raises:
        StorageFullError: a folder has not so many free.
    """
    need: dict[str, int] = {}
    for target, source in sources.items():
        layers = layers_of(hypervisor, domain, source)
        sizes = hypervisor.allocated((str(number), layer) for number, layer in enumerate(layers))
        folder = files[target].rpartition("/")[0]
        need[folder] = need.get(folder, 0) + sum(sizes.values())
    for folder, count in need.items():
        free = hypervisor.free_bytes(folder)
        if free is not None and free < count:
            msg = (
                f"the copy takes up to {count / 2**20:.0f} MiB in {folder}, which has {free / 2**20:.0f} MiB free. "
                "Nothing was changed: free some space, or name another place"
            )
            raise StorageFullError(msg, operation="file_copy", domain=domain.name)
    return need


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Say of a file that is there already what it may be."""
    try:
        yield
    except SnapshotExistsError as error:
        msg = (
            f"{path} exists already: it is another one's, or left of a copy that was cut off. Nothing was changed: "
            "move it away, or choose another name or folder"
        )
        raise CopyRefusedError(msg) from error


@dataclass
class Copier:
    """Makes copies beside a domain that goes on; its takes go on too, only its deletes wait.

    Args:
        progress: is told what takes long, and how to ask how much of it is done.
        wanted: whether a further file is to be begun; libvirt ends the one it copies.
    """

    hypervisor: Hypervisor
    locks: DomainLocks
    locked: Callable[[Domain], AbstractContextManager[None]]
    """Holds the domain's own lock."""
    progress: Callable[[str, Measure], AbstractContextManager[object]] = field(
        default=lambda _what, _measure: nullcontext()
    )
    wanted: Callable[[], bool] = lambda: True

    def export(self, domain_uuid: str, snapshot: str, folder: str) -> dict[str, str]:
        """Copy the snapshot's disks into a folder, and return the files by disk target.

        Raises:
            CopyRefusedError: it cannot be copied, or was stopped; no file is left.
            SnapshotExistsError, StorageFullError, HypervisorError: likewise.
        """
        with self.locks.reading(domain_uuid, wanted=self.wanted):
            domain, _, plan = self._plan(domain_uuid, snapshot, folder=folder)
            self._copy_all(domain, plan)
        return plan.files

    def clone(
        self, domain_uuid: str, snapshot: str, name: str, *, network: bool = False
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Define a second domain on stand-alone copies; return its files and what is not in it.

        Raises:
            CopyRefusedError, SnapshotExistsError, StorageFullError, HypervisorError: there is none; no file is left.
        """
        with self.locks.reading(domain_uuid, wanted=self.wanted):
            domain, _, plan = self._plan(domain_uuid, snapshot, name=name)
            self._refuse_name(name)
            self._copy_all(domain, plan)
            try:
                left_out = self._define(domain, snapshot, name, str(uuid.uuid4()), plan, network=network)
            except BaseException:
                self._remove(plan.files.values())
                raise
        return plan.files, left_out

    def link(
        self, domain_uuid: str, snapshot: str, name: str, *, network: bool = False
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Define a second domain on thin overlays on the snapshot, which is held for as long as that domain exists.

        Raises:
            CopyRefusedError, SnapshotExistsError, StorageFullError, HypervisorError: there is none; no file is left.
        """
        own = str(uuid.uuid4())
        with self.locked(self.hypervisor.domain(domain_uuid)):
            domain, found, plan = self._plan(domain_uuid, snapshot, name=name)
            self._refuse_name(name)
            mark = found.mark
            if mark is None:
                msg = (
                    f"{snapshot} was not made by kvmsnapd, which cannot hold it for a linked copy. Nothing was "
                    "changed: leave --linked out"
                )
                raise CopyRefusedError(msg)
            # Before there is anything that stands on it. Of a domain that never comes to be it is dropped again.
            self.hypervisor.describe_snapshot(domain_uuid, snapshot, replace(mark, linked=(*mark.linked, own)))
            made: list[str] = []
            try:
                for target, path in plan.files.items():
                    with _explained(path):
                        self.hypervisor.create_overlays(domain_uuid, snapshot, {target: path})
                    made.append(path)
                left_out = self._define(domain, snapshot, name, own, plan, network=network)
            except BaseException:
                self._remove(made)
                with suppress(HypervisorError):
                    self.hypervisor.describe_snapshot(domain_uuid, snapshot, mark)
                raise
        return plan.files, left_out

    def _plan(
        self, domain_uuid: str, snapshot: str, *, name: str | None = None, folder: str | None = None
    ) -> tuple[Domain, Snapshot, CopyPlan]:
        domain = self.hypervisor.domain(domain_uuid)
        found = next((s for s in domain.snapshots if s.name == snapshot), None)
        if found is None:
            msg = f"{domain.name} has no snapshot {snapshot} any more; nothing was changed"
            raise SnapshotNotFoundError(msg, operation="copy", domain=domain.name)
        plan = plan_copy(domain, found, name=name, folder=folder)
        if isinstance(plan, str):
            msg = f"{plan}. Nothing was changed"
            raise CopyRefusedError(msg)
        return domain, found, plan

    def _refuse_name(self, name: str) -> None:
        if any(inventory.name == name for inventory in self.hypervisor.inventory()):
            msg = f"there is a domain {name} already. Nothing was changed: choose another name"
            raise CopyRefusedError(msg)

    def _copy_all(self, domain: Domain, plan: CopyPlan) -> None:
        total = sum(copy_bytes(self.hypervisor, domain, plan.sources, plan.files).values())

        def measure() -> tuple[int, int]:
            return sum(self.hypervisor.allocated(plan.files.items()).values()), total

        made: list[str] = []
        try:
            with self.progress(f"{domain.name} is copied", measure):
                for target, source in plan.sources.items():
                    self._refuse_if_stopped()
                    with _explained(plan.files[target]):
                        self.hypervisor.copy_file(source, plan.files[target])
                    made.append(plan.files[target])
        except BaseException:
            self._remove(made)
            raise

    def _refuse_if_stopped(self) -> None:
        if not self.wanted():
            msg = "stopped; nothing is left of the copy"
            raise CopyRefusedError(msg)

    def _define(
        self, domain: Domain, snapshot: str, name: str, own: str, plan: CopyPlan, *, network: bool
    ) -> tuple[str, ...]:
        return self.hypervisor.define_copy(
            domain.uuid, snapshot, name=name, uuid=own, disks=plan.files, network=network
        )

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(HypervisorError):
                self.hypervisor.remove_file(path)
