"""What the guest agent is asked past libvirt's own calls."""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

_ANSWERS_WITHIN_SECONDS = 5


def is_frozen(handle: Any) -> bool:  # noqa: ANN401  # libvirt-python has no types
    """Return whether the agent says that the guest's file systems are frozen; False if it does not say.

    This command is allowed while all others are disabled. Debian 12's agent (QEMU 7.2) says why they are, "the agent is
    in frozen state"; Debian 13's (10.0) does not, and is only known to be frozen by this question (measured).
    """
    try:
        answer = libvirt_qemu.qemuAgentCommand(
            handle, '{"execute": "guest-fsfreeze-status"}', _ANSWERS_WITHIN_SECONDS, 0
        )
        return bool(json.loads(answer).get("return") == "frozen")
    except (libvirt.libvirtError, ValueError):
        return False
