"""``kvmsnapd restore --as`` and ``kvmsnapd export``: a snapshot beside its domain, which goes on."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd.cli.find import find_domain, find_snapshot
from kvmsnapd.cli.work import bench
from kvmsnapd.copier import Copier
from kvmsnapd.errors import CopyRefusedError, InvalidValueError
from kvmsnapd.model import PairName
from kvmsnapd.watching import Work

if TYPE_CHECKING:
    import argparse
    from contextlib import AbstractContextManager

    from kvmsnapd.cli.work import Bench
    from kvmsnapd.copier import Measure
    from kvmsnapd.model import Domain, Inventory

_NAME = r"[^/\n-][^/\n]{0,99}"


def copy_domain(arguments: argparse.Namespace) -> int:
    """Make a second domain from a snapshot, on copies or, with ``--linked``, on thin overlays."""
    name: str = arguments.as_name
    if not re.fullmatch(_NAME, name) or not name.isprintable():
        msg = f"{name!r} cannot be the name of a domain: no '/', no '-' in front, and at most 100 printable characters"
        raise InvalidValueError(msg)
    with bench(arguments) as work:
        domain = find_domain(work.fleet.domains, arguments.domain)
        snapshot = find_snapshot(domain, arguments.snapshot).name
        copier = _copier(work, domain)
        make = copier.link if arguments.linked else copier.clone
        try:
            files, left_out = work.finish(lambda: make(domain.uuid, snapshot, name, network=arguments.network))
        except CopyRefusedError as error:
            return _refused(work, error)
        if work.json:
            answer = {"domain": name, "of": domain.name, "snapshot": snapshot, "files": files, "left_out": left_out}
            print(json.dumps(answer, indent=2))
            return 0
        print(f"{name} is {domain.name} as of {snapshot}; it is defined and does not run")
        for target, path in files.items():
            print(f"  {target}  {path}")
        if left_out:
            print(f"  not in it: {', '.join(left_out)}")
        if arguments.linked:
            print(f"  {snapshot} is held for as long as {name} exists")
        print(f"To start it:          virsh start {shlex.quote(name)}")
        # Not by --remove-all-storage: it leaves files that are in no storage pool.
        print(f"To be rid of it:      virsh undefine {shlex.quote(name)} --nvram && rm {shlex.join(files.values())}")
        return 0


def export(arguments: argparse.Namespace) -> int:
    """Copy a snapshot's disks as stand-alone files."""
    folder = Path(arguments.files).absolute()
    with bench(arguments) as work:
        domain = find_domain(work.fleet.domains, arguments.domain)
        snapshot = find_snapshot(domain, arguments.snapshot).name
        copier = _copier(work, domain)
        try:
            files = work.finish(lambda: copier.export(domain.uuid, snapshot, str(folder)))
        except CopyRefusedError as error:
            return _refused(work, error)
        if work.json:
            print(json.dumps({"domain": domain.name, "snapshot": snapshot, "files": files}, indent=2))
            return 0
        print(f"{domain.name} as of {snapshot}, each file with all of its disk's data:")
        for target, path in files.items():
            print(f"  {target}  {path}")
        return 0


def _refused(work: Bench, error: CopyRefusedError) -> int:
    print(f"kvmsnapd: {error}", file=sys.stderr)
    return work.exit_code(failed=True)


def _copier(work: Bench, domain: Inventory) -> Copier:
    name = PairName(domain.name, domain.uuid, "-")
    left = "The file is noted as unfinished: the same command makes it anew, and `kvmsnapd doctor` names what is left."

    def show(what: str, measure: Measure) -> AbstractContextManager[None]:
        return work.watching(Work(name, what, left), measure)

    def locked(_domain: Domain) -> AbstractContextManager[None]:
        return work.locked(name, "making a linked copy")

    spared = max((p.policy.min_free_bytes for p in work.fleet.pairs if p.name.domain_uuid == domain.uuid), default=0)
    return Copier(work.host, work.locks, locked, progress=show, wanted=work.wanted, spared=spared)
