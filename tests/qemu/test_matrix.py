"""Every shape of domain in every state, on both generations: a snapshot that holds its moment, or a refusal.

What is expected of each cell is written down in `RULES`, not derived from the code under test. A snapshot is proven by
data: a pattern written before it is found in what it froze, one written after it is not, and that one survives the
snapshot's deletion. A refusal is proven by putting the same request to libvirt without us.

The table in tests/README.md is made from what was found: `MATRIX_TABLE=write ./dev test tests/qemu/test_matrix.py`.
Without the variable each cell is compared with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import stat
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import libvirt
import pytest

from kvmsnapd.config import load_config
from kvmsnapd.disks import data_folders
from kvmsnapd.errors import ConfigError
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.model import Consistency, Kind, TakeRequest
from kvmsnapd.naming import format_name
from kvmsnapd.policy import ConsistencyRule, DiskSelection
from kvmsnapd.preflight import plan_take
from kvmsnapd.prune import find_obstacle
from kvmsnapd.refusal import Refusal
from tests.builders import a_policy
from tests.lab.commands import run
from tests.lab.generations import roots as generation_roots
from tests.lab.guest import guests_on
from tests.lab.images import backing_chain, check_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmsnapd.model import Snapshot
    from kvmsnapd.policy import Policy
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

    Grounds = Callable[["Cell"], contextlib.AbstractContextManager["Ground"]]

pytestmark = pytest.mark.qemu

STATES = {
    "shut off": libvirt.VIR_DOMAIN_SHUTOFF,
    "running": libvirt.VIR_DOMAIN_RUNNING,
    "paused": libvirt.VIR_DOMAIN_PAUSED,
}
KINDS = ("external", "internal", "memory live")

# ---- shapes ------------------------------------------------------------------------------------------------------

QCOW2, RAW = "qcow2", "raw"
EXTRA = "vdx"


@dataclass(frozen=True)
class Shape:
    """One kind of domain: one or two disks, vda and vdb, and what is special about it."""

    guest: dict[str, Any] = field(default_factory=dict)
    """Options of `Guest`."""
    also: str = ""
    """The target of one more disk, which no snapshot covers."""
    also_is: str = ""
    """XML below that disk's element."""
    device: str = "disk"
    """Of that disk."""
    attribute: str = ""
    """Of that disk's element."""
    also_format: str = RAW
    left_out: bool = False
    """Whether the policy leaves that disk out."""
    source: str = "file"
    """What vda is: `file`, `block` (a loop device) or `volume` (of a storage pool)."""
    overlay_directory: bool = False
    most_disks: int = 2


SHAPES = {
    "qcow2, guest agent": Shape({"boots": True, "agent": True}),
    "qcow2": Shape(),
    "raw": Shape({"image_format": RAW}),
    "UEFI": Shape({"firmware": True}),
    "CD-ROM": Shape(also="hda", device="cdrom", also_is="<readonly/>"),
    "floppy": Shape(also="fda", device="floppy"),
    "excluded disk": Shape(also=EXTRA, also_format=QCOW2, left_out=True),
    # One disk is enough to see these.
    "snapshot='no' in its XML": Shape(also=EXTRA, also_format=QCOW2, attribute="snapshot='no'", most_disks=1),
    "read-only disk": Shape(also=EXTRA, also_is="<readonly/>", most_disks=1),
    "shared raw disk": Shape(also=EXTRA, also_is="<shareable/>", most_disks=1),
    "transient disk": Shape(also=EXTRA, also_format=QCOW2, also_is="<transient/>", most_disks=1),
    "transient disk, excluded": Shape(
        also=EXTRA, also_format=QCOW2, also_is="<transient/>", left_out=True, most_disks=1
    ),
    "block device": Shape({"image_format": RAW}, source="block", overlay_directory=True, most_disks=1),
    "block device, no overlay_directory": Shape({"image_format": RAW}, source="block", most_disks=1),
    "volume of a pool": Shape(source="volume", most_disks=1),
}


# ---- what is expected --------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One cell of the matrix."""

    generation: str
    shape: str
    disks: int
    state: str
    kind: str


@dataclass(frozen=True)
class Rule:
    """What is expected of the cells that it fits; "" fits all, and the first rule that fits counts."""

    shape: str
    kind: str
    state: str
    generation: str
    word: str
    """As in the table: `taken …`, a `RefusalReason`, or `config error`."""
    says: str = ""
    """What the refusal's detail must hold: the disk, and what is wrong with it."""
    bare: str = ""
    """How libvirt itself refuses this, "" where it does not and harm is seen only later."""
    harm: str = ""
    """How libvirt, which takes this one, refuses to delete it."""

    def fits(self, cell: Cell) -> bool:
        """Tell whether the rule is about this cell."""
        own = (self.generation, self.shape, self.state, self.kind)
        return all(word in {"", its} for word, its in zip(own, (cell[0], cell[1], *cell[3:]), strict=True))


_INTERNAL_RAW = "internal snapshot for disk {} unsupported for storage type raw"
_NO_JOBS = f"block jobs are not supported on transient disk '{EXTRA}'"
_NO_MIGRATION = "migration with transient disk is not supported"

# Source: libvirt's own words in the last column, measured with 9.0.0 and 11.3.0, and asserted below.
# fmt: off
RULES = (
    Rule("raw", "internal", "", "", "disk", "vda has format raw", _INTERNAL_RAW.format("vda")),
    # Refused by 9.0; by NEWS allowed since 9.3 for domains that are off, since 10.10 for others with NVRAM in qcow2.
    Rule("UEFI", "internal", "", "libvirt9", "unsupported", "UEFI", "VM with pflash based firmware are not supported"),
    Rule("UEFI", "internal", "running", "libvirt11", "unsupported", "UEFI", "require QCOW2 nvram format"),
    Rule("UEFI", "internal", "paused", "libvirt11", "unsupported", "UEFI", "require QCOW2 nvram format"),
    # Internal: all writable disks or none, and a floppy counts as one.
    Rule("floppy", "internal", "", "", "disk", "fda is a floppy", _INTERNAL_RAW.format("fda")),
    Rule("excluded disk", "internal", "", "", "config error", "internal snapshots cover all disks or none",
         f"disk '{EXTRA}' must use snapshot mode 'internal'"),
    Rule("snapshot='no' in its XML", "internal", "", "", "disk", f"{EXTRA} is left out by snapshot='no'",
         "require all disks to be selected for snapshot"),
    Rule("shared raw disk", "internal", "", "", "disk", f"{EXTRA} is shared", _INTERNAL_RAW.format(EXTRA)),
    Rule("shared raw disk", "", "", "", "disk", f"{EXTRA} is shared",
         f"shared access for disk '{EXTRA}' requires use of supported storage format"),
    # Of one that is off libvirt takes it; what comes of that is a test of its own.
    Rule("transient disk", "", "shut off", "", "disk", f"{EXTRA} is transient"),
    Rule("transient disk", "internal", "", "", "disk", f"{EXTRA} is transient", _NO_MIGRATION),
    Rule("transient disk", "", "", "", "disk", f"{EXTRA} is transient", _NO_JOBS),
    # Left out it does no harm, but RAM is saved as for a migration.
    Rule("transient disk, excluded", "internal", "", "", "config error", "internal snapshots cover all disks or none",
         f"disk '{EXTRA}' must use snapshot mode 'internal'"),
    Rule("transient disk, excluded", "memory live", "running", "", "disk", f"{EXTRA} is transient", _NO_MIGRATION),
    Rule("transient disk, excluded", "memory live", "paused", "", "disk", f"{EXTRA} is transient", _NO_MIGRATION),
    Rule("block device", "internal", "", "", "disk", "vda has format raw", _INTERNAL_RAW.format("vda")),
    Rule("block device, no overlay_directory", "internal", "", "", "disk", "vda has format raw",
         _INTERNAL_RAW.format("vda")),
    Rule("block device, no overlay_directory", "", "", "", "disk", "vda is of type block: set overlay_directory",
         "source for disk 'vda' is not a regular file; refusing to generate external snapshot name"),
    # RAM is saved as if for a migration, from which QEMU returns only when the guest runs. Until then no such snapshot
    # can be deleted, nor another one be taken.
    Rule("", "memory live", "paused", "libvirt9", "state", "paused", harm="Block node is read-only"),
    Rule("", "memory live", "paused", "libvirt11", "state", "paused", harm="can't be a backing child of active"),
    # All else is taken, as consistent as the state allows: a freeze needs an agent in a guest that runs.
    Rule("", "", "shut off", "", "taken offline"),
    Rule("", "internal", "", "", "taken memory"),
    Rule("", "memory live", "", "", "taken memory"),
    Rule("qcow2, guest agent", "external", "running", "", "taken filesystem"),
    Rule("", "external", "", "", "taken crash"),
)
# fmt: on


def expected(cell: Cell) -> Rule:
    """Return the rule of this cell."""
    return next(rule for rule in RULES if rule.fits(cell))


GROUPS = tuple(
    (generation, name, disks)
    for generation, (name, shape) in itertools.product(generation_roots(), SHAPES.items())
    for disks in range(1, shape.most_disks + 1)
)
CELLS = tuple(Cell(*group, state, kind) for group, state, kind in itertools.product(GROUPS, STATES, KINDS))

# ---- one domain after the other ----------------------------------------------------------------------------------

OFFSET, LENGTH = 50 << 20, 64 << 10
"""The part of each disk that is written; the guest's file system has nothing there."""
_DISK_ONLY = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
_BARE = "<domainsnapshot><name>bare</name></domainsnapshot>"
_LIVE = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC

_slots = itertools.count()


class Layer(NamedTuple):
    """The active layer of one disk, as the domain's XML has it."""

    path: Path
    format: str
    backing: tuple[str, ...]
    """What the XML says of the layers below; one of a shut-off domain need not say it."""


class Ground:
    """One domain of a shape, its files, and the hypervisor under test."""

    def __init__(self, libvirtd: Libvirtd, directory: Path, cell: Cell) -> None:
        self.group = cell[:3]
        self.shape = SHAPES[cell.shape]
        self.libvirtd = libvirtd
        self._clean_up = contextlib.ExitStack()
        try:
            self._make(directory, cell.disks)
        except BaseException:
            self.close()
            raise

    def _make(self, directory: Path, disks: int) -> None:
        shape, extra = self.shape, ""
        if shape.also:
            bus = {"cdrom": "ide", "floppy": "fdc"}.get(shape.device, "virtio")
            extra = f"""<disk type='file' device='{shape.device}' {shape.attribute}>
                          <driver name='qemu' type='{shape.also_format}'/><source file='{{directory}}/also.img'/>
                          <target dev='{shape.also}' bus='{bus}'/>{shape.also_is}
                        </disk>"""
        # Given back after the guest is gone.
        device = self._loop_device(directory) if shape.source == "block" else None
        make = self._clean_up.enter_context(guests_on(self.libvirtd, directory))
        options = {"boots": False, "agent": False, "disks": disks, "extra": extra} | shape.guest
        self.guest: Guest = make(running=False, **options)
        self.folder = self.guest.directory
        self.overlays = self.folder
        if shape.also:
            run("qemu-img", "create", "-q", "-f", shape.also_format, self.folder / "also.img", "1440K")
        if shape.overlay_directory:
            self.overlays = self.folder / "overlays"
            self.overlays.mkdir()
        if device:
            self._put_vda_on("block", dev=str(device))
        elif shape.source == "volume":
            pool = f"<name>images</name><target><path>{self.folder}</path></target>"
            self.libvirtd.connect().storagePoolCreateXML(f"<pool type='dir'>{pool}</pool>")
            self._put_vda_on("volume", pool="images", volume=self.guest.images[0].name)
        self.host = LibvirtHost(self.libvirtd.uri)
        self._clean_up.callback(self.host.close)
        self.uuid = self.guest.domain.UUIDString()

    def _loop_device(self, directory: Path) -> Path:
        """Make a block device of a file. Its node is in our folder, since /dev of the namespaces has no such nodes."""
        directory.mkdir(parents=True)
        below, node = directory / "below", directory / "device"
        run("truncate", "--size=64M", below)
        name = run("losetup", "--find", "--show", below).strip()
        self._clean_up.callback(run, "losetup", "--detach", name)
        os.mknod(node, stat.S_IFBLK | 0o600, Path(name).stat().st_rdev)
        return node

    def _put_vda_on(self, kind: str, **source: str) -> None:
        root = ET.fromstring(self.guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314  # libvirt's own
        disk = _disk(root, "vda")
        disk.set("type", kind)
        disk.remove(_child(disk, "source"))
        ET.SubElement(disk, "source", source)
        self.libvirtd.connect().defineXML(ET.tostring(root, encoding="unicode"))

    def close(self) -> None:
        """Remove all of it."""
        self._clean_up.close()

    def become(self, state: str) -> None:
        """Bring the domain into this state."""
        if self.guest.state == STATES[state]:
            return
        if state == "shut off":
            self.guest.destroy()
            return
        if self.guest.state == libvirt.VIR_DOMAIN_SHUTOFF:
            self.guest.start()
            self.guest.wait_up()
        if state == "paused":
            self.guest.domain.suspend()
        elif self.guest.state == libvirt.VIR_DOMAIN_PAUSED:
            self.guest.domain.resume()

    def assert_is(self, state: str) -> None:
        """Assert that the domain is in this state, by libvirt's word, QEMU's and that of the guest itself."""
        now, reason = self.guest.domain.state()
        assert now == STATES[state]
        if state == "shut off":
            assert self.guest.pid is None
            return
        assert self.guest.ask_qemu("info status").strip().startswith(f"VM status: {state}")
        if state == "paused":
            assert reason == libvirt.VIR_DOMAIN_PAUSED_USER
        elif self.guest.boots:
            assert self.guest.alive()
            assert not self.guest.agent or not self.guest.frozen()

    # ---- disks, as libvirt's XML and the files themselves have them

    def layer(self, target: str) -> Layer:
        """Return the active layer of a disk."""
        disk = _disk(ET.fromstring(self.guest.domain.XMLDesc()), target)  # noqa: S314  # libvirt's own
        chain = (_source(element) for element in disk.iterfind(".//backingStore/source/.."))
        return Layer(self.file_of(_source(disk)), _child(disk, "driver").attrib["type"], tuple(chain))

    def file_of(self, source: str) -> Path:
        """Return the file that is meant by what the XML names as a source."""
        return Path(source) if source.startswith("/") else self.folder / source  # of the pool, which is this folder

    def files(self) -> set[str]:
        """Return all files of the domain but for its console."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)) for path in found} - {"console"}

    def write(self, byte: int) -> None:
        """Write a pattern to each covered disk, whether QEMU has it open or not."""
        for target in self.guest.targets:
            layer = self.layer(target)
            command = f"write -P {byte} {OFFSET} {LENGTH}"
            if self.guest.state == libvirt.VIR_DOMAIN_SHUTOFF:
                run("qemu-io", "-f", layer.format, "-c", command, layer.path)
                continue
            # Through the guest's own device, as if it came from there; that works while it stands still, too.
            disk = _disk(ET.fromstring(self.guest.domain.XMLDesc()), target)  # noqa: S314  # libvirt's own
            device = f"/machine/peripheral/{_child(disk, 'alias').attrib['name']}/virtio-backend"
            for step in (command, "flush"):
                said = self.guest.ask_qemu(f'qemu-io -d {device} "{step}"')
                assert not said.strip(), said

    def assert_holds(self, layer: Path, layer_format: str, byte: int) -> None:
        """Assert that a layer, with those below it, holds a pattern."""
        check = f"read -P {byte} {OFFSET} {LENGTH}"
        said = run("qemu-io", "-r", "-U", "-f", layer_format, "-c", check, layer)
        assert "verification failed" not in said, said

    def layers_by_target(self) -> dict[str, Layer]:
        """Return the active layers of all covered disks."""
        return {target: self.layer(target) for target in self.guest.targets}


def _disk(root: ET.Element, target: str) -> ET.Element:
    return next(disk for disk in root.iter("disk") if disk.find(f"target[@dev='{target}']") is not None)


def _child(element: ET.Element, name: str) -> ET.Element:
    child = element.find(name)
    assert child is not None, ET.tostring(element)
    return child


def _source(element: ET.Element) -> str:
    source = _child(element, "source").attrib
    return source.get("file") or source.get("dev") or source["volume"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def grounds(generations: Callable[[str], Libvirtd], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grounds]:
    """Give the domain for a cell: that of the cell before if it is of the same group, and did not fail."""
    current: list[Ground] = []

    def drop() -> None:
        while current:
            current.pop().close()

    @contextlib.contextmanager
    def ground(cell: Cell) -> Iterator[Ground]:
        if current and current[0].group != cell[:3]:
            drop()
        if not current:
            current.append(Ground(generations(cell.generation), tmp_path_factory.mktemp("matrix") / "m", cell))
        try:
            current[0].become(cell.state)
            yield current[0]
        except BaseException:
            drop()
            raise

    yield ground
    drop()
    if os.environ.get(WRITE) == "write":
        missing = set(CELLS) - FOUND.keys()
        assert not missing, f"the table is written from a whole run in which no cell failed; {len(missing)} are missing"
        before, _, after = _readme()
        README.write_text(f"{before}{BEGIN}\n\n{format_table(FOUND)}\n{END}{after}")


# ---- the cells ---------------------------------------------------------------------------------------------------

WRITE = "MATRIX_TABLE"
FOUND: dict[Cell, str] = {}
"""What the cells that have run in this session came to."""


def _id(value: tuple[str, str, int] | str) -> str:
    words = value if isinstance(value, str) else "-".join(map(str, value))
    return re.sub(r"[^A-Za-z0-9-]+", "_", words)


# By their scopes pytest keeps cells of one domain together, and of these the ones in one state, in whatever order.
@pytest.mark.parametrize("kind", KINDS, ids=_id)
@pytest.mark.parametrize("state", STATES, ids=_id, scope="class")
@pytest.mark.parametrize("group", GROUPS, ids=_id, scope="module")
def test_a_cell_is_a_snapshot_of_its_moment_or_a_true_refusal(
    group: tuple[str, str, int], state: str, kind: str, grounds: Grounds, tmp_path: Path
) -> None:
    cell = Cell(*group, state, kind)
    rule = expected(cell)
    with grounds(cell) as ground:
        answer = _plan(ground, cell.kind)
        if rule.word == "config error":
            _assert_config_refuses(tmp_path / "kvmsnapd.yaml", rule)
            word = rule.word
        elif isinstance(answer, Refusal):
            assert (answer.reason.value, rule.says in answer.detail) == (rule.word, True), answer
            word = answer.reason.value
        else:
            word = f"taken {answer.mark.consistency}"
            assert word == rule.word, answer
            _assert_it_holds_its_moment(ground, cell, answer)
        if rule.bare:
            _assert_libvirt_refuses(ground, cell, rule)
        if rule.harm:
            _assert_libvirt_does_harm(ground, rule)
    FOUND[cell] = word
    if os.environ.get(WRITE) != "write":
        assert read_table(_readme()[1]).get(cell) == word, f"{README.name} says otherwise; {WRITE}=write writes it anew"


def _policy(ground: Ground, kind: str) -> Policy:
    return a_policy(
        kind=Kind.INTERNAL if kind == "internal" else Kind.EXTERNAL,
        consistency=ConsistencyRule.FILESYSTEM_PREFERRED if kind == "external" else ConsistencyRule.MEMORY,
        memory_live=kind == "memory live",
        max_pause=timedelta(minutes=1),
        disks=DiskSelection(exclude=(ground.shape.also,)) if ground.shape.left_out else DiskSelection(),
        overlay_directory=str(ground.overlays) if ground.shape.overlay_directory else None,
    )


def _plan(ground: Ground, kind: str) -> TakeRequest | Refusal:
    policy, domain = _policy(ground, kind), ground.host.domain(ground.uuid)
    slot = datetime(2026, 11, 22, tzinfo=UTC) + timedelta(hours=next(_slots))
    storage = ground.host.storage(domain, data_folders(domain, policy))
    return plan_take(domain, policy, ground.host.capabilities(), slot=slot, now=slot, storage=storage)


def _assert_config_refuses(path: Path, rule: Rule) -> None:
    path.write_text(
        "policies:\n  standard: {schedule: hourly, keep: {last: 1}, kind: internal, "
        f"disks: {{exclude: [{EXTRA}]}}}}\ndomains: {{}}\n"
    )
    with pytest.raises(ConfigError, match=re.escape(rule.says)):
        load_config(path)


def _assert_libvirt_refuses(ground: Ground, cell: Cell, rule: Rule) -> None:
    """Put the same request to libvirt without us, as one would with virsh."""
    before, files = ground.guest.domain.XMLDesc(), ground.files()
    what, flags = "", 0
    if ground.shape.left_out:
        what = f"<disks><disk name='{ground.shape.also}' snapshot='no'/></disks>"
    if cell.kind != "internal":
        flags = _DISK_ONLY
        if cell.kind == "memory live" and cell.state != "shut off":
            what += f"<memory snapshot='external' file='{ground.folder}/bare.mem'/>"
            flags = _LIVE
    with pytest.raises(libvirt.libvirtError, match=re.escape(rule.bare)):
        ground.guest.domain.snapshotCreateXML(f"<domainsnapshot><name>bare</name>{what}</domainsnapshot>", flags)
    assert (ground.guest.domain.XMLDesc(), ground.files()) == (before, files)


def _assert_libvirt_does_harm(ground: Ground, rule: Rule) -> None:
    """Let libvirt take a snapshot with the RAM of a paused domain, and see what cannot be done afterwards."""

    def take(name: str) -> libvirt.virDomainSnapshot:
        disks = [f"<disk name='{t}'><source file='{ground.folder}/{t}.{name}'/></disk>" for t in ground.guest.targets]
        if ground.shape.also:
            disks.append(f"<disk name='{ground.shape.also}' snapshot='no'/>")
        memory = f"<memory snapshot='external' file='{ground.folder}/{name}.mem'/>"
        words = f"<name>{name}</name>{memory}<disks>{''.join(disks)}</disks>"
        return ground.guest.domain.snapshotCreateXML(f"<domainsnapshot>{words}</domainsnapshot>", _LIVE)

    files = ground.files()
    snapshot = take("bare")
    with pytest.raises(libvirt.libvirtError, match=re.escape(rule.harm)):
        snapshot.delete()
    with pytest.raises(libvirt.libvirtError, match="paused due to previous migration"):
        take("again")
    ground.become("running")
    snapshot.delete()
    (ground.folder / "bare.mem").unlink(missing_ok=True)  # libvirt 9.0 leaves it behind
    assert ground.files() == files


def _assert_it_holds_its_moment(ground: Ground, cell: Cell, request: TakeRequest) -> None:
    before, after = 0x11, 0x22
    ground.write(before)
    layers, files = ground.layers_by_target(), ground.files()
    others = {path: _digest(path) for path in [ground.folder / "also.img"] if path.exists()}

    taken = ground.host.take_snapshot(request)

    ground.assert_is(cell.state)
    _assert_listed(ground, cell, request, taken)
    frozen = {target: _digest(layer.path) for target, layer in layers.items()}
    ground.write(after)
    if cell.kind == "internal":
        assert ground.layers_by_target() == layers
        assert ground.files() == files
        for target, layer in layers.items():
            _assert_inside(ground, layer, taken.name, before, ram=cell.state != "shut off" and target == "vda")
    else:
        _assert_outside(ground, cell, request, layers, before)
        assert {target: _digest(layer.path) for target, layer in layers.items()} == frozen
    for layer in ground.layers_by_target().values():
        ground.assert_holds(layer.path, layer.format, after)
        _check(ground, layer.path)

    domain = ground.host.domain(ground.uuid)
    assert find_obstacle(domain, taken.name, ground.host.capabilities()) is None
    ground.host.delete_snapshot(ground.uuid, taken.name)

    ground.assert_is(cell.state)
    assert ground.host.domain(ground.uuid).snapshots == ()
    assert ground.guest.domain.snapshotNum() == 0
    assert ground.layers_by_target() == layers
    assert ground.files() == files
    for layer in layers.values():
        assert backing_chain(layer.path) == [layer.path]
        assert "snapshots" not in _image(layer.path)
        ground.assert_holds(layer.path, layer.format, after)
        _check(ground, layer.path)
    assert {path: _digest(path) for path in others} == others


def _assert_listed(ground: Ground, cell: Cell, request: TakeRequest, taken: Snapshot) -> None:
    """Assert that it is listed as ours and as what it is, by our reading and by libvirt's own words."""
    assert ground.host.domain(ground.uuid).snapshots == (taken,)
    kind = "internal" if cell.kind == "internal" else "external"
    excluded = (ground.shape.also,) if ground.shape.left_out else ()
    assert (taken.name, taken.mark, taken.kind) == (request.name, request.mark, kind)
    assert taken.name == format_name("standard", request.mark.scheduled_at)
    assert request.mark.excluded == excluded
    assert taken.offline == (cell.state == "shut off")

    (record,) = ground.guest.domain.listAllSnapshots()
    root = ET.fromstring(record.getXMLDesc())  # noqa: S314  # libvirt's own
    said = json.loads(root.findtext("description", ""))
    consistency = expected(cell).word.removeprefix("taken ")
    assert (said["kind"], said["consistency"]) == (kind, consistency)
    assert said.get("excluded", []) == [*excluded]
    modes = {disk.attrib["name"]: disk.get("snapshot") for disk in root.iterfind("disks/disk")}
    assert modes == dict.fromkeys(ground.guest.targets, kind) | ({ground.shape.also: "no"} if ground.shape.also else {})
    memory = root.find("memory")
    assert (memory.get("snapshot", "no") if memory is not None else "no") == (
        kind if consistency == Consistency.MEMORY else "no"
    )


def _assert_outside(ground: Ground, cell: Cell, request: TakeRequest, layers: dict[str, Layer], before: int) -> None:
    """Assert that each disk has an overlay of ours on the frozen layer, which holds what was there before."""
    name = ground.guest.name
    overlays = {t: ground.overlays / f"{name}.{t}.{request.name}.qcow2" for t in ground.guest.targets}
    made = set(overlays.values())
    if expected(cell).word == "taken memory":
        memory = ground.overlays / f"{name}.{request.name}.mem"
        made.add(memory)
        saved = memory.read_bytes()
        assert saved.startswith(b"LibvirtQemudSave")
        assert len(saved) > 500_000  # of a guest that has not gone beyond its firmware
        assert b"GUEST-UP" in saved or not ground.guest.boots
    left = {path for path in ground.folder.rglob(f"*{request.name}*") if path.is_file()}
    assert left == made
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    for target, layer in layers.items():
        now = ground.layer(target)
        assert (now.path, now.format) == (overlays[target], QCOW2)
        assert backing_chain(now.path) == [now.path, layer.path]
        assert _image(now.path)["backing-filename-format"] == layer.format
        if cell.state != "shut off":
            assert [ground.file_of(source) for source in now.backing] == [layer.path]
        ground.assert_holds(layer.path, layer.format, before)
        _check(ground, layer.path)


def _assert_inside(ground: Ground, layer: Layer, name: str, before: int, *, ram: bool) -> None:
    """Assert that the image has an internal snapshot that holds what was there before, and the RAM if it should."""
    (inside,) = _image(layer.path)["snapshots"]
    assert (inside["name"], inside["vm-state-size"] > 0) == (name, ram)
    raw = ground.folder / "restored"
    run("qemu-img", "convert", "-U", "-l", f"snapshot.name={name}", "-O", "raw", layer.path, raw)
    with raw.open("rb") as file:
        file.seek(OFFSET)
        assert file.read(LENGTH) == bytes([before]) * LENGTH
    raw.unlink()


def _image(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    return described


def _check(ground: Ground, path: Path) -> None:
    """Check a layer. One in use is looked at again: what QEMU has not yet written back looks like a leak."""
    for _ in range(4 if ground.guest.state == libvirt.VIR_DOMAIN_RUNNING else 0):
        with contextlib.suppress(AssertionError):
            check_image(path)
            return
    check_image(path)


def test_each_refused_shape_and_kind_is_held_against_libvirt_itself() -> None:
    refused = [cell for cell in CELLS if not expected(cell).word.startswith("taken")]
    proven = {(c.generation, c.shape, c.kind) for c in refused if expected(c).bare or expected(c).harm}
    assert {(c.generation, c.shape, c.kind) for c in refused} == proven


def test_libvirt_puts_an_overlay_on_a_floppy_that_nobody_names(libvirtd: Libvirtd, tmp_path: Path) -> None:
    with contextlib.closing(Ground(libvirtd, tmp_path / "f", Cell("", "floppy", 1, "running", "external"))) as ground:
        ground.become("running")
        ground.guest.domain.snapshotCreateXML(_BARE, _DISK_ONLY)
        assert ground.layer("fda").path == ground.folder / "also.bare"


def test_libvirt_cannot_delete_a_snapshot_of_a_transient_disk_once_the_domain_runs(
    libvirtd: Libvirtd, tmp_path: Path
) -> None:
    cell = Cell("", "transient disk", 1, "shut off", "external")
    with contextlib.closing(Ground(libvirtd, tmp_path / "t", cell)) as ground:
        snapshot = ground.guest.domain.snapshotCreateXML(_BARE, _DISK_ONLY)
        ground.become("running")
        with pytest.raises(
            libvirt.libvirtError, match=r"Dirty bitmap .* not found|disk source are not the same|on transient disk"
        ):
            snapshot.delete()


# ---- the table ---------------------------------------------------------------------------------------------------

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin: made by tests/qemu/test_matrix.py -->", "<!-- end -->"


def _readme() -> tuple[str, str, str]:
    """Return the document before, in and after the table."""
    before, begin, rest = README.read_text().partition(BEGIN)
    table, end, after = rest.partition(END)
    assert begin, f"{README}: no {BEGIN}"
    assert end, f"{README}: no {END}"
    return before, table.strip(), after


def _columns() -> list[tuple[str, str]]:
    return [(kind, generation) for kind in KINDS for generation in generation_roots()]


def format_table(found: dict[Cell, str]) -> str:
    """Write what was found as a table; rows that say the same are one."""
    rows: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    lines: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for shape, state in itertools.product(SHAPES, STATES):
        by_disks: dict[tuple[str, ...], list[str]] = {}
        for disks in range(1, SHAPES[shape].most_disks + 1):
            words = tuple(found[Cell(generation, shape, disks, state, kind)] for kind, generation in _columns())
            by_disks.setdefault(words, []).append(str(disks))
        for words, counts in by_disks.items():
            lines[shape, _listed(counts), state] = words
    for (shape, disks, state), words in lines.items():
        rows.setdefault((shape, disks, *words), []).append((shape, disks, state))
    merged: dict[tuple[str, ...], list[str]] = {}
    for (shape, disks, *words), same in rows.items():
        merged.setdefault((disks, _listed(state for _, _, state in same), *words), []).append(shape)
    head = ["shape", "disks", "state", *(f"{kind}, {generation}" for kind, generation in _columns())]
    body = [["; ".join(shapes), *rest] for rest, shapes in merged.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def read_table(text: str) -> dict[Cell, str]:
    """Return the cells of a table."""
    found = {}
    for line in text.splitlines()[2:]:
        shapes, disks, states, *words = (word.strip() for word in line.strip("|").split("|"))
        for shape, count, state in itertools.product(shapes.split("; "), disks.split(", "), states.split(", ")):
            for (kind, generation), word in zip(_columns(), words, strict=True):
                found[Cell(generation, shape, int(count), state, kind)] = word
    return found


@pytest.mark.skipif(os.environ.get("MATRIX_TABLE") == "write", reason="it is written after this")
def test_the_table_in_the_readme_is_whole() -> None:
    _, table, _ = _readme()
    stated = read_table(table)
    assert stated.keys() == set(CELLS)
    assert table == format_table(stated).strip()
