"""libvirt's XML: what QEMU domains and snapshots look like, read into values; and our request written."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from kvmsnapd.domain_xml import (
    DomainDocument,
    format_request,
    parse_domain,
    parse_snapshot,
    with_description,
    with_files_for_volumes,
)
from kvmsnapd.model import Consistency, Disk, Hold, Kind, Mark, Snapshot, TakeRequest, Unchanged
from kvmsnapd.naming import format_description
from tests.builders import UUID, at

NAME = "kvmsnapd-standard-20261122T120000Z"
MARK = Mark("standard", at("2026-11-22T12:00"), at("2026-11-22T12:00:03"), Consistency.FILESYSTEM, Kind.EXTERNAL)

CHAIN_OF_THREE = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
  <source file='/images/web1.vda.kvmsnapd-standard-20261122T120000Z.qcow2' index='4'/>
  <backingStore type='file' index='3'>
    <format type='qcow2'/>
    <source file='/images/web1.vda.kvmsnapd-standard-20261122T110000Z.qcow2'/>
    <backingStore type='file' index='2'>
      <format type='qcow2'/>
      <source file='/images/web1.vda.before-upgrade.qcow2'/>
      <backingStore type='file' index='1'>
        <format type='raw'/>
        <source file='/images/web1.img'/>
        <backingStore/>
      </backingStore>
    </backingStore>
  </backingStore>
  <target dev='vda' bus='virtio'/>
  <alias name='virtio-disk0'/>
</disk>"""

SINGLE = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/images/web1.qcow2' index='1'/>
  <backingStore/>
  <target dev='vda' bus='virtio'/>
</disk>"""

CDROM = """
<disk type='file' device='cdrom'>
  <driver name='qemu' type='raw'/>
  <source file='/iso/install.iso'/>
  <backingStore/>
  <target dev='sda' bus='sata'/>
  <readonly/>
</disk>"""

EMPTY_CDROM = """
<disk type='file' device='cdrom'>
  <driver name='qemu'/>
  <target dev='sdb' bus='sata'/>
  <readonly/>
</disk>"""

FLOPPY = """
<disk type='file' device='floppy'>
  <driver name='qemu' type='raw'/>
  <source file='/images/drivers.img'/>
  <target dev='fda' bus='fdc'/>
</disk>"""

BLOCK = """
<disk type='block' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native'/>
  <source dev='/dev/vg0/web1'/>
  <target dev='vdb' bus='virtio'/>
</disk>"""

NETWORK = """
<disk type='network' device='disk'>
  <driver name='qemu' type='raw'/>
  <source protocol='rbd' name='pool/web1'><host name='mon1' port='6789'/></source>
  <target dev='vdc' bus='virtio'/>
</disk>"""

VOLUME = """
<disk type='volume' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source pool='default' volume='web1.qcow2'/>
  <target dev='vdd' bus='virtio'/>
</disk>"""

SHARED = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/>
  <source file='/images/quorum.img'/>
  <target dev='vde' bus='virtio'/>
  <shareable/>
</disk>"""

TRANSIENT = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/images/scratch.qcow2'/>
  <target dev='vdf' bus='virtio'/>
  <transient/>
</disk>"""

WITHOUT_DRIVER = """
<disk type='file' device='disk'>
  <source file='/guest/diskimage1'/>
  <target dev='hda' bus='ide'/>
</disk>"""

MIRRORED = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/images/web1.overlay.qcow2' index='2'/>
  <backingStore type='file' index='1'>
    <format type='qcow2'/>
    <source file='/images/web1.qcow2'/>
    <backingStore/>
  </backingStore>
  <mirror type='file' job='active-commit' ready='yes'>
    <format type='qcow2'/>
    <source file='/images/web1.qcow2' index='1'/>
  </mirror>
  <target dev='vda' bus='virtio'/>
</disk>"""

AGENT = """
<channel type='unix'>
  <source mode='bind' path='/run/libvirt/qemu/channel/1-web1/org.qemu.guest_agent.0'/>
  <target type='virtio' name='org.qemu.guest_agent.0' state='{state}'/>
</channel>"""

SPICE = """
<channel type='spicevmc'>
  <target type='virtio' name='com.redhat.spice.0' state='connected'/>
</channel>"""


def a_document(*devices: str, loader: str = "") -> DomainDocument:
    return parse_domain(
        f"""<domain type='kvm' id='1' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
          <name>web1</name><uuid>{UUID}</uuid><memory unit='KiB'>1048576</memory>
          <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{loader}<boot dev='hd'/></os>
          <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{"".join(devices)}</devices></domain>"""
    )


@pytest.mark.parametrize(
    ("xml", "disk"),
    [
        (SINGLE, Disk("vda", path="/images/web1.qcow2")),
        (
            CHAIN_OF_THREE,
            Disk(
                "vda",
                path=f"/images/web1.vda.{NAME}.qcow2",
                backing=(
                    "/images/web1.vda.kvmsnapd-standard-20261122T110000Z.qcow2",
                    "/images/web1.vda.before-upgrade.qcow2",
                    "/images/web1.img",
                ),
            ),
        ),
        (CDROM, Disk("sda", "cdrom", path="/iso/install.iso", format="raw", readonly=True)),
        (EMPTY_CDROM, Disk("sdb", "cdrom", path=None, format="raw", readonly=True)),
        (FLOPPY, Disk("fda", "floppy", path="/images/drivers.img", format="raw")),
        (BLOCK, Disk("vdb", source_type="block", path="/dev/vg0/web1", format="raw")),
        (NETWORK, Disk("vdc", source_type="network", path=None, format="raw")),
        (VOLUME, Disk("vdd", source_type="volume", path="web1.qcow2", pool="default")),
        (SHARED, Disk("vde", path="/images/quorum.img", format="raw", shareable=True)),
        (TRANSIENT, Disk("vdf", path="/images/scratch.qcow2", transient=True)),
        (WITHOUT_DRIVER, Disk("hda", path="/guest/diskimage1", format="raw")),
        (MIRRORED, Disk("vda", path="/images/web1.overlay.qcow2", backing=("/images/web1.qcow2",), block_job=True)),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.target,
)
def test_a_disk_is_read(xml: str, disk: Disk) -> None:
    assert a_document(xml).disks == (disk,)


def test_disks_keep_their_order() -> None:
    assert [disk.target for disk in a_document(BLOCK, SINGLE, CDROM).disks] == ["vdb", "vda", "sda"]


@pytest.mark.parametrize(
    ("xml", "holds_state"), [(SINGLE, True), (BLOCK, True), (CDROM, False), (FLOPPY, False), (TRANSIENT, True)]
)
def test_media_hold_no_state(xml: str, holds_state: bool) -> None:
    assert a_document(xml).disks[0].holds_state is holds_state


def test_a_cdrom_is_read_only_even_if_it_does_not_say_so() -> None:
    assert a_document(CDROM.replace("<readonly/>", "")).disks[0].readonly


@pytest.mark.parametrize(
    ("channels", "connected"),
    [
        ([AGENT.format(state="connected")], True),
        ([AGENT.format(state="disconnected")], False),
        ([AGENT.replace(" state='{state}'", "")], False),  # the domain is shut off
        ([SPICE], False),
        ([SPICE, AGENT.format(state="connected")], True),
        ([], False),
    ],
    ids=["connected", "disconnected", "shut off", "another channel", "the second channel", "none"],
)
def test_the_agent_is_connected_when_its_channel_is(channels: list[str], connected: bool) -> None:
    assert a_document(SINGLE, *channels).agent_connected is connected


@pytest.mark.parametrize(
    ("loader", "pflash"),
    [
        ("", False),
        ("<loader readonly='yes' type='rom'>/usr/share/seabios/bios.bin</loader>", False),
        ("<loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>", True),
        ("<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/nvram/web1_VARS.fd</nvram>", True),
    ],
    ids=["bios", "rom", "pflash", "nvram"],
)
def test_uefi_firmware_is_seen(loader: str, pflash: bool) -> None:
    assert a_document(SINGLE, loader=loader).pflash is pflash


def test_a_domain_without_devices_has_no_disks() -> None:
    text = "<domain type='test'><name>bare</name><os><type>hvm</type></os></domain>"
    assert parse_domain(text) == DomainDocument(disks=(), pflash=False, agent_connected=False, memory_bytes=0)


def test_the_memory_is_read_in_bytes() -> None:
    text = "<domain type='kvm'><name>bare</name><memory unit='KiB'>524288</memory></domain>"
    assert parse_domain(text).memory_bytes == 512 * 2**20


# Snapshots


def a_snapshot_document(
    *disks: str, memory: str | None = "no", name: str = "before-upgrade", description: str = "", parent: str = ""
) -> str:
    modes = "".join(f"<disk name='vd{letter}' snapshot='{mode}'/>" for letter, mode in zip("abcd", disks, strict=False))
    return f"""<domainsnapshot>
      <name>{name}</name>
      {f"<description>{description}</description>" if description else ""}
      <state>running</state>
      {f"<parent><name>{parent}</name></parent>" if parent else ""}
      <creationTime>1795348803</creationTime>
      {f"<memory snapshot='{memory}'/>" if memory else ""}
      {f"<disks>{modes}</disks>" if disks else ""}
      <domain type='kvm'><name>web1</name><description>of the domain, not the snapshot</description>
        <devices><disk type='file' device='disk' snapshot='internal'><target dev='vda'/></disk></devices></domain>
      <cookie><cpu mode='custom'/></cookie>
    </domainsnapshot>"""


@pytest.mark.parametrize(
    ("disks", "memory", "kind"),
    [
        (["external", "external"], "no", Kind.EXTERNAL),
        (["external", "no"], "no", Kind.EXTERNAL),
        (["external"], "external", Kind.EXTERNAL),
        (["internal"], "internal", Kind.INTERNAL),
        (["internal", "no"], "no", Kind.INTERNAL),
        (["internal"], None, Kind.INTERNAL),
        (["internal", "external"], "no", Kind.MIXED),
        (["internal"], "external", Kind.MIXED),
        (["external"], "internal", Kind.MIXED),
        ([], None, Kind.INTERNAL),  # libvirt's test driver
        ([], "external", Kind.EXTERNAL),
        (["no", "no"], "internal", Kind.INTERNAL),
    ],
)
def test_the_kind_follows_from_disks_and_memory(disks: list[str], memory: str | None, kind: Kind) -> None:
    assert parse_snapshot(a_snapshot_document(*disks, memory=memory)).kind is kind


@pytest.mark.parametrize("disks", [["manual"], ["manual", "no"]])
def test_a_disk_that_somebody_snapshots_by_other_means_is_of_no_kind_we_make(disks: list[str]) -> None:
    """The mode ``manual`` came with libvirt 8.2; such a snapshot must not end the reading of all others."""
    assert parse_snapshot(a_snapshot_document(*disks)).kind is Kind.MIXED


def test_a_foreign_snapshot_is_read_whole() -> None:
    text = a_snapshot_document("external", description="made by hand", parent="first")
    assert parse_snapshot(text) == Snapshot(
        "before-upgrade", at("2026-11-22T12:00:03"), Kind.EXTERNAL, parent="first", mark=None
    )


def test_a_snapshot_of_ours_carries_its_mark() -> None:
    snapshot = parse_snapshot(a_snapshot_document("external", name=NAME, description=format_description(MARK)))
    assert snapshot == Snapshot(NAME, at("2026-11-22T12:00:03"), Kind.EXTERNAL, parent=None, mark=MARK)


def test_our_name_with_a_description_of_somebody_else_is_foreign() -> None:
    assert parse_snapshot(a_snapshot_document("external", name=NAME, description="mine now")).mark is None


def test_our_name_without_a_description_is_foreign() -> None:
    assert parse_snapshot(a_snapshot_document("external", name=NAME)).mark is None


def test_what_a_snapshot_covers_and_where_its_ram_is_are_read() -> None:
    text = f"""<domainsnapshot><name>{NAME}</name><state>shutoff</state><creationTime>1795348803</creationTime>
      <memory snapshot='external' file='/images/web1.mem'/>
      <disks><disk name='vda' snapshot='external' type='file'><source file='/images/top'/></disk>
        <disk name='vdb' snapshot='no'/></disks>
      <domain type='kvm'><name>web1</name><devices>{SINGLE}{VOLUME}{EMPTY_CDROM}</devices></domain>
      <inactiveDomain type='kvm'><name>web1</name><devices>{BLOCK}</devices></inactiveDomain></domainsnapshot>"""
    snapshot = parse_snapshot(text)
    assert (snapshot.offline, snapshot.memory_file) == (True, "/images/web1.mem")
    assert snapshot.overlays == (("vda", "/images/top"),)
    assert snapshot.covers == (("vda", "/images/web1.qcow2"), ("vdd", "web1.qcow2"))


# Snapshots written anew


def test_a_new_description_replaces_that_of_the_snapshot_and_nothing_else() -> None:
    seen = Unchanged(at("2026-11-22T13:00"), at("2026-11-22T13:00:01"))
    changed = replace(MARK, hold=Hold("a & b <c> \\1 \\g<0> ]]>"), unchanged=seen)
    before = a_snapshot_document("external", name=NAME, description=format_description(MARK), parent="first")
    after = with_description(before, changed)
    assert parse_snapshot(after) == replace(parse_snapshot(before), mark=changed)
    assert "<description>of the domain, not the snapshot</description>" in after
    assert with_description(after, MARK) == before


def test_volumes_of_a_pool_become_the_files_that_they_are() -> None:
    text = f"""<domainsnapshot xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{NAME}</name>
      <disks><disk name='vdd' snapshot='external' type='file'><source file='/pool/top'/></disk></disks>
      <domain type='kvm'><name>web1</name><metadata><ns7:a xmlns:ns7='urn:x'/></metadata>
        <devices>{SINGLE}{VOLUME}</devices>
        <qemu:commandline><qemu:arg value='-s'/></qemu:commandline></domain>
      <inactiveDomain type='kvm'><name>web1</name><devices>{VOLUME}</devices></inactiveDomain></domainsnapshot>"""
    root = ET.fromstring(with_files_for_volumes(text, {"vdd": "/pool/web1.qcow2"}))  # noqa: S314
    disks = [
        (disk.get("type"), disk.find("source").attrib)  # type: ignore[union-attr]
        for disk in root.iterfind(".//devices/disk")
    ]
    as_file = ("file", {"file": "/pool/web1.qcow2"})
    assert disks == [("file", {"file": "/images/web1.qcow2", "index": "1"}), as_file, as_file]
    assert root.find(".//{http://libvirt.org/schemas/domain/qemu/1.0}arg") is not None
    assert root.find(".//{urn:x}a") is not None


def test_a_volume_of_which_no_file_is_known_stays_as_it_is() -> None:
    text = f"<domainsnapshot><domain><devices>{VOLUME}</devices></domain></domainsnapshot>"
    root = ET.fromstring(with_files_for_volumes(text, {"vda": "/x", "vdd": ""}))  # noqa: S314
    disk = root.find(".//disk")
    assert disk is not None
    assert disk.get("type") == "volume"


# Requests


def a_request(**fields: object) -> TakeRequest:
    return TakeRequest(UUID, "web1", NAME, MARK, **fields)  # type: ignore[arg-type]


def test_an_external_request_names_every_disk() -> None:
    text = format_request(
        a_request(overlays=(("vda", "/images/a.qcow2"), ("vdb", "/images/b.qcow2")), excluded=("sda",))
    )
    root = ET.fromstring(text)  # noqa: S314
    assert [(e.tag, e.text) for e in root if e.tag != "disks"] == [
        ("name", NAME),
        ("description", format_description(MARK)),
    ]
    assert [(disk.attrib, [(child.tag, child.attrib) for child in disk]) for disk in root.iterfind("disks/disk")] == [
        (
            {"name": target, "snapshot": "external", "type": "file"},
            [("driver", {"type": "qcow2"}), ("source", {"file": f"/images/{letter}.qcow2"})],
        )
        for target, letter in (("vda", "a"), ("vdb", "b"))
    ] + [({"name": "sda", "snapshot": "no"}, [])]


def test_a_request_without_files_lists_no_disks() -> None:
    assert "<disks" not in format_request(a_request())


def test_a_request_with_ram_names_its_file() -> None:
    mark = replace(MARK, consistency=Consistency.MEMORY)
    asked = TakeRequest(UUID, "web1", NAME, mark, (("vda", "/images/top"),), memory_file="/images/web1.mem")
    memory = ET.fromstring(format_request(asked)).find("memory")  # noqa: S314
    assert memory is not None
    assert memory.attrib == {"snapshot": "external", "file": "/images/web1.mem"}
    assert "<memory" not in format_request(replace(asked, memory_file=None))


def test_names_with_special_characters_are_escaped() -> None:
    text = format_request(a_request(overlays=(("vda", "/images/a&b <c>'\".qcow2"),)))
    source = ET.fromstring(text).find("disks/disk/source")  # noqa: S314
    assert source is not None
    assert source.get("file") == "/images/a&b <c>'\".qcow2"


def test_a_request_is_read_back_as_a_snapshot_of_ours() -> None:
    assert parse_snapshot(format_request(a_request(overlays=(("vda", "/images/a.qcow2"),)))).mark == MARK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<domainsnapshot>",
        "<domainsnapshot><creationTime>x</creationTime></domainsnapshot>",
        "<domainsnapshot><creationTime>99999999999999</creationTime></domainsnapshot>",
    ],
)
def test_a_snapshot_that_cannot_be_understood_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_snapshot(text)


def test_a_disk_left_out_by_its_owner_and_the_overlays_of_a_snapshot_are_read() -> None:
    (disk,) = parse_domain("<domain><devices><disk snapshot='no'><target dev='vdb'/></disk></devices></domain>").disks
    assert disk.left_out
    snapshot = parse_snapshot(
        "<domainsnapshot><name>s</name><state>shutoff</state><disks><disk name='vda' snapshot='external' type='file'>"
        "<source file='/images/o.qcow2'/></disk><disk name='vdb' snapshot='no'/></disks></domainsnapshot>"
    )
    assert (snapshot.offline, snapshot.overlays) == (True, (("vda", "/images/o.qcow2"),))
