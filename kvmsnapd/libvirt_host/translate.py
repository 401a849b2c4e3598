"""libvirt's error numbers to our exceptions, in one table."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import libvirt

from kvmsnapd.errors import (
    DomainBusyError,
    DomainNotFoundError,
    FreezeRefusedError,
    GuestAgentRefusedError,
    GuestAgentUnavailableError,
    GuestFrozenError,
    HypervisorError,
    HypervisorUnreachableError,
    MergeFailedError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Errors added by later libvirt versions than the one the binding was built for arrive as bare numbers.
_AGENT_COMMAND_TIMEOUT, _AGENT_COMMAND_FAILED = 112, 113

_ERRORS: dict[int, type[HypervisorError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: DomainNotFoundError,
    libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT: SnapshotNotFoundError,
    libvirt.VIR_ERR_STORAGE_VOL_EXIST: SnapshotExistsError,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: DomainBusyError,
    libvirt.VIR_ERR_BLOCK_COPY_ACTIVE: DomainBusyError,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: GuestAgentUnavailableError,
    libvirt.VIR_ERR_AGENT_UNSYNCED: GuestAgentUnavailableError,
    _AGENT_COMMAND_TIMEOUT: GuestAgentUnavailableError,
    _AGENT_COMMAND_FAILED: GuestAgentRefusedError,
}

# libvirt has no number of its own for it: "domain moment X already exists" of its list of snapshots, "external snapshot
# file for disk X already exists" of the overlay, which it looks at first, "volume target path X already exists" of a
# file that its pool does not know yet (measured, 9.0 and 11.3).
_EXISTS = {libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_OPERATION_INVALID}


# And for a file that the pool knows: "storage volume name 'X' already in use", an internal error.
_VOLUME_EXISTS = re.compile("storage volume name .* already in use")


def broken_connection(error: BaseException) -> bool:
    """Tell whether an error means that libvirt did not answer, so that what was asked may have happened.

    It shows in the error's domain, not its number: the numbers are those of unrelated failures (measured with libvirtd
    killed in a call: SYSTEM_ERROR, then INTERNAL_ERROR).
    """
    if isinstance(error, libvirt.libvirtError):
        return error.get_error_domain() in {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}
    return isinstance(error, HypervisorUnreachableError)


@contextmanager
def translated_errors(operation: str, *, domain: str | None = None) -> Iterator[None]:
    """Turn a ``libvirtError`` raised in the block into the matching :class:`HypervisorError`."""
    try:
        yield
    except libvirt.libvirtError as error:
        code = error.get_error_code()
        if broken_connection(error):
            kind: type[HypervisorError] = HypervisorUnreachableError
        elif code == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED and "agent" in str(error):
            kind = GuestAgentUnavailableError  # no agent channel in the domain's XML
        elif "agent is in frozen state" in str(error):
            kind = GuestFrozenError
        elif code == libvirt.VIR_ERR_INTERNAL_ERROR and "QEMU agent command" in str(error):
            kind = GuestAgentRefusedError  # before libvirt 11.2 the agent's own error has no number (measured, 9.0)
        elif (code in _EXISTS and "already exists" in str(error)) or _VOLUME_EXISTS.search(str(error)):
            kind = SnapshotExistsError
        elif "block commit failed" in str(error):
            kind = MergeFailedError
        elif "No space left on device" in str(error):
            kind = StorageFullError  # in the words of whichever program met it: it has no number of its own
        else:
            kind = _ERRORS.get(code, HypervisorError)
        if kind is GuestAgentRefusedError and "guest-fsfreeze-freeze" in str(error):
            kind = FreezeRefusedError
        words = (error.get_error_message() or str(error)).strip().rstrip(".")
        message = f"{words} (libvirt error {code})"
        raise kind(message, operation=operation, domain=domain, code=code) from error
