"""Copy what a snapshot froze: as files, as a second domain, or as a thin one that stands on it."""

from __future__ import annotations

import uuid
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from kvmsnapd.copies import CopyPlan, note_of, noted, plan_copy
from kvmsnapd.errors import (
    CopyRefusedError,
    DomainNotFoundError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)
from kvmsnapd.model import DomainState, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, Mark, Snapshot
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
    hypervisor: Hypervisor,
    domain: Domain,
    sources: Iterable[tuple[str, str]],
    files: Mapping[str, str],
    *,
    spared: int = 0,
) -> dict[str, int]:
    """Return, by folder, how many bytes stand-alone copies of these files take at the most.

    Args:
        sources: by disk target; one that is there twice counts twice.
        spared: bytes that are to stay free in each folder.

    Raises:
        StorageFullError: a folder has not so many free.
    """
    need = {path.rpartition("/")[0]: 0 for path in files.values()}
    for target, source in sources:
        layers = layers_of(hypervisor, domain, source)
        sizes = hypervisor.allocated((str(number), layer) for number, layer in enumerate(layers))
        folder = files[target].rpartition("/")[0]
        need[folder] += sum(sizes.values())
    for folder, count in need.items():
        free = hypervisor.free_bytes(folder)
        if free is not None and free < count + spared:
            kept = f", of which min_free keeps {spared / 2**20:.0f} MiB" if spared else ""
            msg = (
                f"the copy takes up to {count / 2**20:.0f} MiB in {folder}, which has {free / 2**20:.0f} MiB free"
                f"{kept}. Nothing was changed: free some space, or name another place"
            )
            raise StorageFullError(msg, operation="file_copy", domain=domain.name)
    return need


@dataclass
class Copier:
    """Makes copies beside a domain that goes on; its takes go on too, only its deletes wait.

    Beside each file there is a note from before it is begun until it has its use. So a call that is cut off, at any
    instant, leaves nothing that could be taken for a copy, and the same call begins anew.

    Args:
        progress: is told what takes long, and how to ask how much of it is done.
        wanted: whether a further file is to be begun; libvirt ends the one it copies.
        spared: bytes that a second domain leaves free in the folders of the disks.
    """

    hypervisor: Hypervisor
    locks: DomainLocks
    locked: Callable[[Domain], AbstractContextManager[None]]
    """Holds the domain's own lock."""
    progress: Callable[[str, Measure], AbstractContextManager[object]] = field(
        default=lambda _what, _measure: nullcontext()
    )
    wanted: Callable[[], bool] = lambda: True
    spared: int = 0

    def export(self, domain_uuid: str, snapshot: str, folder: str) -> dict[str, str]:
        """Copy the snapshot's disks into a folder, and return the files by disk target.

        Raises:
            CopyRefusedError: it cannot be copied, or was stopped; no file is left.
            HypervisorUnreachableError: libvirt went away; what is left has a note, and the same call begins anew.
            DomainLockedError, SnapshotNotFoundError, StorageFullError, HypervisorError: no file is left.
        """
        with self._reading(domain_uuid, snapshot):
            domain, found, plan = self._plan(domain_uuid, snapshot, folder=folder)
            with self._making(plan, self._lay(domain, found)) as made:
                self._copy_all(domain, found, plan, made)
        return plan.files

    def clone(
        self, domain_uuid: str, snapshot: str, name: str, *, network: bool = False
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Define a second domain on stand-alone copies; return its files and what is not in it.

        Raises:
            CopyRefusedError: it cannot be copied, or was stopped; there is no domain, and no file is left.
            HypervisorUnreachableError: libvirt went away; what is left has a note, and the same call begins anew.
            DomainLockedError, SnapshotNotFoundError, StorageFullError, HypervisorError: no file is left.
        """
        with self._reading(domain_uuid, snapshot):
            domain, found, plan = self._plan(domain_uuid, snapshot, name=name)
            self._refuse_name(name)
            with self._making(plan, self._lay(domain, found)) as made:
                self._copy_all(domain, found, plan, made, spared=self.spared)
                self._refuse_if_stopped()
                left_out = self._define(domain, snapshot, name, str(uuid.uuid4()), plan, network=network)
        ram = found.memory_file or (found.kind is Kind.INTERNAL and not found.offline)
        return plan.files, (*(("the guest's RAM of then",) if ram else ()), *left_out)

    def link(
        self, domain_uuid: str, snapshot: str, name: str, *, network: bool = False
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Define a second domain on thin overlays on the snapshot, which is held for as long as that domain exists.

        Raises:
            CopyRefusedError: there can be none; there is no domain, and no file is left.
            HypervisorUnreachableError: libvirt went away; what is left has a note, and the same call begins anew.
            DomainLockedError, SnapshotNotFoundError, StorageFullError, HypervisorError: no file is left.
        """
        own = str(uuid.uuid4())
        with self.locked(self.hypervisor.domain(domain_uuid)):
            domain, found, plan = self._plan(domain_uuid, snapshot, name=name, stands=True)
            self._refuse_name(name)
            mark = found.mark
            if mark is None:
                msg = (
                    f"{snapshot} was not made by kvmsnapd, which cannot hold it for a linked copy. Nothing was "
                    "changed: leave --linked out"
                )
                raise CopyRefusedError(msg)
            copy_bytes(self.hypervisor, domain, (), plan.files, spared=self.spared)
            lay = self._lay(domain, None)
            with self._making(plan, lay) as made, self._linking(domain_uuid, snapshot, mark, own):
                for target, path in plan.files.items():
                    with _explained(path):
                        self.hypervisor.create_overlays(domain_uuid, snapshot, {target: path})
                    made.append(path)
                left_out = self._define(domain, snapshot, name, own, plan, network=network)
        return plan.files, left_out

    @contextmanager
    def _reading(self, domain_uuid: str, snapshot: str) -> Iterator[None]:
        """Keep what the snapshot froze as it is; for an internal one that is the domain's own image, takes included."""
        domain, found = self._find(domain_uuid, snapshot)
        own = self.locked(domain) if found.kind is Kind.INTERNAL else nullcontext()
        with own, self.locks.reading(domain_uuid, wanted=self.wanted):
            yield

    def _find(self, domain_uuid: str, snapshot: str) -> tuple[Domain, Snapshot]:
        domain = self.hypervisor.domain(domain_uuid)
        found = next((s for s in domain.snapshots if s.name == snapshot), None)
        if found is None:
            msg = f"{domain.name} has no snapshot {snapshot} any more; nothing was changed"
            raise SnapshotNotFoundError(msg, operation="copy", domain=domain.name)
        return domain, found

    def _plan(
        self,
        domain_uuid: str,
        snapshot: str,
        *,
        name: str | None = None,
        folder: str | None = None,
        stands: bool = False,
    ) -> tuple[Domain, Snapshot, CopyPlan]:
        domain, found = self._find(domain_uuid, snapshot)
        plan = plan_copy(domain, found, name=name, folder=folder, stands=stands)
        if isinstance(plan, str):
            _refuse(plan)
        return domain, found, plan

    def _refuse_name(self, name: str) -> None:
        if any(inventory.name == name for inventory in self.hypervisor.inventory()):
            msg = f"there is a domain {name} already. Nothing was changed: choose another name"
            raise CopyRefusedError(msg)

    @contextmanager
    def _making(self, plan: CopyPlan, lay: Callable[[str, str], None]) -> Iterator[list[str]]:
        """Note the plan's files as unfinished while the block makes them; it adds those that it has made.

        Args:
            lay: makes the note of a disk.
        """
        made: list[str] = []
        notes = {target: note_of(path) for target, path in plan.files.items()}
        with ExitStack() as held:
            for path in sorted(plan.files.values()):
                held.enter_context(self.locks.making(path))
            self._clear(plan.files.values())
            try:
                for target, note in notes.items():
                    lay(target, note)
                yield made
            except HypervisorUnreachableError:
                raise  # what became of the last call is not known, and the notes tell
            except BaseException:
                with suppress(HypervisorError):  # in this order: what cannot be deleted stays noted
                    self._remove([*made, *notes.values()])
                raise
            with suppress(HypervisorError):  # doctor names it; the copy is whole
                self._remove(notes.values())

    def _lay(self, domain: Domain, snapshot: Snapshot | None) -> Callable[[str, str], None]:
        """Return what makes a note: one from which the data can be read, of an external snapshot that is copied.

        That is an overlay, and not for brevity: libvirt goes by what a file looks like when it copies, so a guest could
        write into a raw disk what makes it a qcow2 file on top of any file of the host. An overlay says what is below.
        """
        if snapshot is None or snapshot.kind is Kind.INTERNAL:
            return lambda _target, note: self.hypervisor.create_empty(note)
        name = snapshot.name
        return lambda target, note: self.hypervisor.create_overlays(domain.uuid, name, {target: note})

    def _clear(self, paths: Iterable[str]) -> None:
        """Delete what an earlier call left unfinished at these places; CopyRefusedError if something else is there."""
        there = self.hypervisor.allocated((path, path) for copy in paths for path in (copy, note_of(copy)))
        finished = [path for path in there if noted(path) is None and note_of(path) not in there]
        if finished:
            _refuse(_occupied(finished[0]))
        if not there:
            return
        used = self._used()
        for path in there:
            user = used.get(noted(path) or path)
            if user:
                _refuse(f"{noted(path) or path} is a disk of {user}; choose another name or folder")
        try:
            self._remove(sorted(there))  # a copy before its note
        except HypervisorUnreachableError:
            raise
        except HypervisorError as error:
            msg = (
                f"what a copy left that was cut off cannot be deleted: {error}. libvirt may still be copying for it; "
                "nothing was changed: try again later"
            )
            raise CopyRefusedError(msg) from error

    def _used(self) -> dict[str, str]:
        """Return the files that libvirt's domains have, with the domain's name."""
        used: dict[str, str] = {}
        for inventory in self.hypervisor.inventory():
            with suppress(DomainNotFoundError):
                domain = self.hypervisor.domain(inventory.uuid)
                used |= {path: domain.name for disk in domain.disks for path in (disk.path, *disk.backing) if path}
                used |= {path: domain.name for s in domain.snapshots for _, path in (*s.covers, *s.overlays)}
        return used

    @contextmanager
    def _linking(self, domain_uuid: str, snapshot: str, mark: Mark, own: str) -> Iterator[None]:
        """Hold the snapshot for a copy from before anything stands on it; not, if none comes to be."""
        self.hypervisor.describe_snapshot(domain_uuid, snapshot, replace(mark, linked=(*mark.linked, own)))
        try:
            yield
        except HypervisorUnreachableError:
            raise  # the copy may have been defined; if not, the next run drops its UUID
        except BaseException:
            with suppress(HypervisorError):
                self.hypervisor.describe_snapshot(domain_uuid, snapshot, mark)
            raise

    def _copy_all(
        self, domain: Domain, snapshot: Snapshot, plan: CopyPlan, made: list[str], *, spared: int = 0
    ) -> None:
        internal = snapshot.kind is Kind.INTERNAL
        notes = {target: note_of(path) for target, path in plan.files.items()}
        sources = list(plan.sources.items())
        # An internal one is copied twice: with all that is in its image, and out of that.
        needed = [*sources, *sources] if internal else sources
        total = sum(copy_bytes(self.hypervisor, domain, needed, plan.files, spared=spared).values())
        making = [*plan.files.items(), *((f"{target} image", path) for target, path in notes.items())]

        def measure() -> tuple[int, int]:
            return sum(self.hypervisor.allocated(making).values()), total

        with self.progress("the copy of its disks", measure):
            if internal:
                self.hypervisor.take_out(domain.uuid, snapshot.name, notes, wanted=self.wanted)
            for target, path in plan.files.items():
                self._refuse_if_stopped()
                with _explained(path):
                    self.hypervisor.copy_file(notes[target], path)
                made.append(path)

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
            self.hypervisor.remove_file(path)


def _refuse(problem: str) -> NoReturn:
    msg = f"{problem}. Nothing was changed"
    raise CopyRefusedError(msg)


def _occupied(path: str) -> str:
    return f"{path} exists already, and is not left of a copy; move it away, or choose another name or folder"


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Say what is in the way if somebody else has made the file since we looked."""
    try:
        yield
    except SnapshotExistsError as error:
        msg = f"{_occupied(path)}. Nothing was changed"
        raise CopyRefusedError(msg) from error
