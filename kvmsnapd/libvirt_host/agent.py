"""What the guest agent is asked past libvirt's own calls."""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

_ANSWERS_WITHIN_SECONDS = 5


def is_frozen(handle: Any) -> bool:  # noqa: ANN401  # libvirt-python has no types
    """Return whether the agent says that the guest's file systems are frozen; False if it does not say.

    This command is allowed while all others are disabled. Why they are, the agent says up to QEMU 9.0 ("the agent is in
    frozen state"); that of 10.0 has one answer for everything that is disabled ("the command is not allowed", measured).
    """
    try:
        answer = libvirt_qemu.qemuAgentCommand(
            handle, '{"execute": "guest-fsfreeze-status"}', _ANSWERS_WITHIN_SECONDS, 0
        )
        return bool(json.loads(answer).get("return") == "frozen")
    except (libvirt.libvirtError, ValueError):
        return False
