"""What a libvirt can do, derived once from its driver and version. Every limit names its source."""

from __future__ import annotations

from kvmsnapd.model import CHAIN_CEILING, Capabilities


def derive_capabilities(driver: str, version: int) -> Capabilities:
    """Return the capabilities of this driver (``QEMU``, ``TEST``) of libvirt ``version`` (9.0.0 is 9000000)."""
    words = f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"
    if driver != "QEMU":
        # test:/// refuses DISK_ONLY: "unsupported flags (0x10)" (measured, 9.0.0); its disks are names only.
        return Capabilities(
            driver.lower(),
            words,
            external_snapshots=False,
            internal_needs_qcow2=False,
            internal_stops_guest=False,
            storage_api=False,
        )
    return Capabilities(
        "qemu",
        words,
        # "revert to external snapshot not supported yet" (9.0.0); came in 9.9 (NEWS).
        revert_external=version >= 9_009_000,
        # Deleting external snapshots came with 9.0 (libvirt NEWS).
        delete_external=version >= 9_000_000,
        # 9.0.0, shut-off domain, layer not in its XML: "could not find base disk source in disk source chain"; 11.3
        # deletes any. In between not measured; external revert, with which the offline code was reworked, came in 9.9.
        delete_external_in_chain_offline=version >= 9_009_000,
        # Refused by 9.0.0 ("pflash based firmware are not supported"), allowed again since 9.3 (NEWS).
        internal_with_pflash_offline=version >= 9_003_000,
        # libvirt with json-c cannot start a domain of 26 overlays (measured, 11.3: "nesting too deep"; 24 work), fixed
        # in 12.0 (NEWS). Which builds before 12.0 use json-c cannot be asked, so all from 10.0 count.
        chain_ceiling=24 if 10_000_000 <= version < 12_000_000 else CHAIN_CEILING,
    )
