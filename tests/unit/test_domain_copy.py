"""The XML of a second domain: nothing of it may be the original's."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from kvmsnapd.domain_copy import DomainCopy, format_copy, format_drill
from tests.builders import OTHER_UUID, UUID

DISK = """<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>
<source file='/images/web1.img' index='3'><seclabel model='dac' relabel='no'/></source>
<backingStore type='file'><source file='/images/base.img'/></backingStore>
<target dev='vda' bus='virtio'/><serial>S1</serial><boot order='1'/><alias name='virtio-disk0'/></disk>"""
FILES = {"vda": "/images/web2.vda.qcow2"}


def snapshot(devices: str = "", *, more: str = "", inactive: str = "") -> str:
    return f"""<domainsnapshot><name>s</name><disks/>
        <domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
          <name>web1</name><uuid>{UUID}</uuid><title>The shop</title><memory unit='KiB'>2097152</memory>
          <currentMemory unit='KiB'>2097152</currentMemory>{more}
          <devices>{DISK}{devices}</devices><seclabel type='dynamic' model='apparmor'/>
        </domain>{inactive}</domainsnapshot>"""


def copied(text: str, *, network: bool = False) -> tuple[ET.Element, DomainCopy]:
    made = format_copy(text, name="web2", uuid=OTHER_UUID, disks=FILES, origin="of web1", network=network)
    return ET.fromstring(made.xml), made  # noqa: S314  # our own


def drilled(text: str, memory_bytes: int | None = None) -> ET.Element:
    made = format_drill(text, name="drill", uuid=OTHER_UUID, disks=FILES, memory_bytes=memory_bytes)
    return ET.fromstring(made)  # noqa: S314  # our own


def test_a_copy_has_a_name_a_uuid_and_files_of_its_own_and_says_where_it_is_from() -> None:
    root, made = copied(snapshot())
    assert [root.findtext(tag) for tag in ("name", "uuid", "title", "description")] == [
        "web2",
        OTHER_UUID,
        "The shop",
        "of web1",
    ]
    assert root.get("id") is None
    assert root.find("seclabel") is None
    assert made.left_out == ()
    (disk,) = root.findall("devices/disk")
    assert disk.find("source[@file='/images/web2.vda.qcow2']") is not None
    assert disk.find("driver[@type='qcow2'][@cache='none']") is not None
    assert disk.findtext("serial") == "S1"
    for gone in ("backingStore", "source/seclabel", "source[@index]", "alias"):
        assert disk.find(gone) is None, gone
    for other in (UUID, "web1.img", "base.img"):
        assert other not in made.xml


@pytest.mark.parametrize("source", ["dev='/dev/vg/web1'", "pool='fast' volume='web1'", "protocol='rbd' name='p/web1'"])
def test_a_disk_of_another_type_becomes_a_file(source: str) -> None:
    text = snapshot().replace("file='/images/web1.img'", source).replace("type='file' device", "type='block' device")
    root, _ = copied(text)
    (disk,) = root.findall("devices/disk")
    (found,) = disk.findall("source")
    assert (disk.get("type"), found.attrib) == ("file", {"file": "/images/web2.vda.qcow2"})


def test_disks_that_are_not_copied_are_left_out_media_are_ejected_and_both_are_said() -> None:
    text = snapshot("""
        <disk type='block' device='disk'><source dev='/dev/sdb'/><target dev='vdb'/></disk>
        <disk type='block' device='cdrom'><source dev='/dev/sr0'/><target dev='sda'/><readonly/></disk>
        <disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>
        <disk type='file' device='floppy'><source file='/a.img'/><target dev='fda'/></disk>""")
    root, made = copied(text)
    assert made.left_out == ("disk vdb", "medium in sda", "medium in fda")
    assert {t.get("dev") for t in root.findall("devices/disk/target")} == {"vda", "sda", "sdb", "fda"}
    assert root.findall("devices/disk[@device='cdrom']/source") == []
    assert root.findall("devices/disk[@device='floppy']/source") == []


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("<hostdev mode='subsystem' type='pci'/>", "passed-through device"),
        ("<filesystem type='mount'><source dir='/srv'/></filesystem>", "shared folder"),
        ("<shmem name='x'/>", "shared memory"),
        ("<memory model='nvdimm'><source><path>/nv</path></source></memory>", "NVDIMM"),
        ("<input type='evdev'><source dev='/dev/input/event1'/></input>", "passed-through input device"),
        ("<tpm model='tpm-tis'><backend type='passthrough'/></tpm>", "passed-through TPM"),
        ("<interface type='hostdev'/>", "network interface"),
    ],
)
def test_what_two_domains_cannot_both_have_is_left_out_and_said(device: str, words: str) -> None:
    root, made = copied(snapshot(device), network=True)
    assert made.left_out == (words,)
    assert [element.tag for element in root.findall("devices/*")] == ["disk"]


def test_ordinary_memory_and_input_stay() -> None:
    kept = "<memory model='dimm'/><input type='tablet'/><memballoon model='virtio'/>"
    root, made = copied(snapshot(kept))
    assert made.left_out == ()
    assert [element.tag for element in root.findall("devices/*")] == ["disk", "memory", "input", "memballoon"]


def test_the_network_is_left_out_unless_it_is_asked_for_and_then_has_addresses_of_its_own() -> None:
    nic = """<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0' portid='p1'/>
        <virtualport type='openvswitch'><parameters interfaceid='i1' profileid='shop'/></virtualport>
        <target dev='vnet3'/><model type='virtio'/></interface>"""
    root, made = copied(snapshot(nic))
    assert (root.find("devices/interface"), made.left_out) == (None, ("network interface",))
    root, made = copied(snapshot(nic), network=True)
    assert made.left_out == ()
    for gone in ("52:54:00:00:00:01", "p1'", 'p1"', "i1", "vnet3"):
        assert gone not in made.xml
    assert root.find("devices/interface/source[@bridge='br0']") is not None
    assert root.find("devices/interface/virtualport/parameters[@profileid='shop']") is not None


def test_firmware_tpm_and_arguments_for_qemu_begin_anew_and_that_is_said() -> None:
    more = f"""<os><loader type='pflash'>/c.fd</loader>
        <nvram template='/v.fd' type='file'><source file='/web1.fd'/></nvram></os><genid>e1</genid>
        <qemu:commandline><qemu:arg value='-drive'/></qemu:commandline>
        <sysinfo type='smbios'><system><entry name='uuid'>{UUID}</entry><entry name='serial'>Z</entry></system>
        </sysinfo>"""
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='file' path='/t'/></backend></tpm>"
    root, made = copied(snapshot(tpm, more=more))
    assert made.left_out == (
        "variables of its firmware, which begin anew",
        "arguments for QEMU",
        "state of its TPM, which begins anew",
    )
    (nvram,) = root.findall("os/nvram")
    assert (nvram.attrib, nvram.text, len(nvram)) == ({"template": "/v.fd"}, None, 0)
    assert "commandline" not in made.xml
    assert root.findtext("genid") == ""
    assert [entry.text for entry in root.findall("sysinfo/system/entry")] == ["Z"]
    assert root.find("devices/tpm/backend[@version='2.0']") is not None
    assert "'/t'" not in made.xml.replace('"', "'")


@pytest.mark.parametrize("kind", ["file", "tcp", "unix", "pty", "dev"])
def test_no_file_socket_or_port_of_a_character_device_is_the_original_s(kind: str) -> None:
    inner = "<source path='/var/of-web1' service='4555' mode='bind'/><log file='/var/of-web1.log'/>"
    text = snapshot(f"""<serial type='{kind}'>{inner}<target port='0'/></serial>
        <console type='{kind}' tty='/var/of-web1'>{inner}<target type='serial' port='0'/></console>
        <channel type='unix'><source mode='bind' path='/var/of-web1'/>
          <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>""")
    root, made = copied(text)
    assert "of-web1" not in made.xml
    assert "4555" not in made.xml
    assert [root.find(f"devices/{tag}").get("type") for tag in ("serial", "console", "channel")] == [  # type: ignore[union-attr]
        "pty",
        "pty",
        "unix",
    ]
    assert root.find("devices/channel/target[@name='org.qemu.guest_agent.0']") is not None
    assert root.find("devices/channel/target[@state]") is None


def test_displays_get_ports_of_their_own() -> None:
    graphics = """<graphics type='vnc' port='5901' websocket='5701' socket='/s1' autoport='no' passwd='x'/>
        <graphics type='spice'><listen type='socket' socket='/s2'/></graphics><graphics type='sdl'/>"""
    root, _ = copied(snapshot(graphics))
    vnc, spice, sdl = root.findall("devices/graphics")
    assert vnc.attrib == {"type": "vnc", "autoport": "yes", "passwd": "x"}
    assert spice.find("listen[@socket]") is None
    assert sdl.attrib == {"type": "sdl"}


def test_of_a_guest_that_ran_what_was_defined_counts_not_what_only_that_run_had() -> None:
    inactive = f"<inactiveDomain type='kvm'><name>web1</name><uuid>{UUID}</uuid><vcpu>4</vcpu><devices>{DISK}</devices>"
    root, _ = copied(snapshot("<hostdev/>", more="<vcpu>8</vcpu>", inactive=f"{inactive}</inactiveDomain>"))
    assert (root.tag, root.findtext("vcpu"), root.findtext("uuid")) == ("domain", "4", OTHER_UUID)


def test_a_snapshot_without_its_domain_cannot_be_copied() -> None:
    with pytest.raises(ValueError, match="the snapshot has no domain"):
        copied("<domainsnapshot><name>s</name></domainsnapshot>")


def test_a_drill_meets_nobody_ends_by_itself_and_has_a_console() -> None:
    devices = """<interface type='network'/><graphics type='vnc'/><sound model='ich9'/><redirdev/><watchdog/>
        <channel type='spicevmc'/>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"""
    root = drilled(snapshot(devices, more="<metadata><a/></metadata><on_reboot>restart</on_reboot>"))
    assert [element.tag for element in root.findall("devices/*")] == ["disk", "channel", "serial"]
    assert [root.findtext(tag) for tag in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3
    assert root.find("metadata") is None
    assert root.find("memory[@unit='KiB']").text == "2097152"  # type: ignore[union-attr]


def test_a_drill_can_have_less_memory() -> None:
    root = drilled(snapshot("<serial type='pty'/>", more="<memoryBacking><hugepages/></memoryBacking>"), 100)
    assert [(m.get("unit"), m.text) for m in (*root.findall("memory"), *root.findall("currentMemory"))] == [
        ("b", "100")
    ] * 2
    assert root.find("memoryBacking") is None
    assert len(root.findall("devices/serial")) == 1
