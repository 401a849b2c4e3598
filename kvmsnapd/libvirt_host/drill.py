"""Boot a throw-away domain and see whether it comes up.

Source of all that is said about libvirt here: measured with 9.0 and 11.3.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import libvirt

from kvmsnapd.domain_copy import format_drill
from kvmsnapd.domain_xml import AGENT_CHANNEL, parse_domain, read_xml
from kvmsnapd.errors import DrillFailedError, DrillRefusedError, HypervisorError
from kvmsnapd.libvirt_host.translate import broken_connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsnapd.model import DrillRequest

_LOOK_SECONDS = 0.2
_AGENT_SECONDS = 5
_MOST_REMEMBERED = 64 * 1024
_OVERHEAD_BYTES = 256 * 2**20
"""What a QEMU takes besides its guest's RAM."""
_LAST_LINES = 3


def run_drill(
    connection: Any,  # noqa: ANN401
    snapshot_xml: str,
    request: DrillRequest,
    *,
    wanted: Callable[[], bool],
    remove: Callable[[str], None],
) -> None:
    """See the port. libvirt ends the domain when this connection closes (AUTODESTROY), so SIGKILL leaves none.

    Args:
        remove: deletes the file of firmware variables that libvirt has made for it.
    """
    text = format_drill(
        snapshot_xml,
        name=request.name,
        uuid=request.uuid,
        disks=request.disks,
        memory_bytes=request.memory_bytes,
    )
    _refuse(connection, text, request)
    try:
        handle = connection.createXML(text, libvirt.VIR_DOMAIN_START_AUTODESTROY)
    except libvirt.libvirtError as error:
        if broken_connection(error):
            raise
        if error.get_error_code() == libvirt.VIR_ERR_ACCESS_DENIED:
            msg = f"libvirt does not allow this user to start a domain ({error}); allow it, or have no drills"
            raise DrillRefusedError(msg) from error
        msg = f"libvirt could not start a copy of it: {error}"
        raise DrillFailedError(msg, reason="start") from error
    variables = ""
    try:
        variables = read_xml(handle.XMLDesc(0)).findtext("os/nvram", "")
        _wait(connection, handle, request, wanted)
    finally:
        with suppress(libvirt.libvirtError):  # it has ended by itself
            handle.destroy()
        if request.name in variables:
            with suppress(HypervisorError):
                remove(variables)


def _refuse(connection: Any, text: str, request: DrillRequest) -> None:  # noqa: ANN401
    agent = read_xml(text).find(f"devices/channel/target[@name='{AGENT_CHANNEL}']")
    if request.console is None and agent is None:
        msg = (
            "nothing would show that the copy is up: the domain has no channel for the guest agent; add one, or "
            "give the policy `verify: {console: TEXT}` with a text on its serial console"
        )
        raise DrillRefusedError(msg)
    need = parse_domain(text).memory_bytes if request.memory_bytes is None else request.memory_bytes
    free = int(connection.getFreeMemory())
    if free < need + _OVERHEAD_BYTES:
        msg = (
            f"a copy takes {(need + _OVERHEAD_BYTES) / 2**20:.0f} MiB of RAM and the host has {free / 2**20:.0f} MiB "
            "free; give the policy `verify: {memory: SIZE}`, or try again later"
        )
        raise DrillRefusedError(msg)


def _wait(connection: Any, handle: Any, request: DrillRequest, wanted: Callable[[], bool]) -> None:  # noqa: ANN401
    """Return once the copy shows that it is up."""
    deadline = time.monotonic() + request.deadline_seconds
    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    said = b""
    try:
        with suppress(libvirt.libvirtError):  # not every domain has a console; then only the agent can tell
            handle.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
        while time.monotonic() < deadline:
            if not wanted():
                msg = "the drill was given up; nothing is left of it"
                raise DrillRefusedError(msg)
            said = (said + _read(stream))[-_MOST_REMEMBERED:]
            if request.console is not None:
                if request.console.encode() in said:
                    return
            elif _agent_answers(handle):
                return
            if not _runs(handle):
                msg = f"the copy ended before it was up{_quoted(said)}"
                raise DrillFailedError(msg, reason="ended")
            time.sleep(_LOOK_SECONDS)
    finally:
        with suppress(libvirt.libvirtError):
            stream.abort()
    sign = f"{request.console!r} on its console" if request.console is not None else "its guest agent"
    msg = f"the copy did not come up within {request.deadline_seconds:.0f} s, as {sign} would show{_quoted(said)}"
    raise DrillFailedError(msg, reason="deadline")


def _read(stream: Any) -> bytes:  # noqa: ANN401
    said = b""
    with suppress(libvirt.libvirtError):
        while isinstance(got := stream.recv(4096), bytes) and got:  # -2 when there is nothing yet
            said += got
    return said


def _runs(handle: Any) -> bool:  # noqa: ANN401
    try:
        return bool(handle.isActive()) and handle.state()[0] != libvirt.VIR_DOMAIN_CRASHED
    except libvirt.libvirtError as error:
        if broken_connection(error):
            raise
        return False


def _agent_answers(handle: Any) -> bool:  # noqa: ANN401
    """Ask the agent something harmless; an error of its own is an answer, too."""
    try:
        if not parse_domain(handle.XMLDesc(0)).agent_connected:
            return False
        handle.agentSetResponseTimeout(_AGENT_SECONDS, 0)
        handle.fsInfo(0)
    except libvirt.libvirtError as error:
        if broken_connection(error):
            raise
        return "agent command" in str(error)
    return True


def _quoted(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    text = " / ".join("".join(c for c in line if c.isprintable())[:120] for line in lines[-_LAST_LINES:])
    return f"; its console ends with: {text}" if text else ""
