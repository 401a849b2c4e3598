"""``kvmsnapd run``."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground until it is told to stop."""
    # A reload may be asked for at once; while the daemon's modules are read that would end us.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from kvmsnapd.daemon import Daemon  # noqa: PLC0415

    faulthandler.enable()  # a watchdog's SIGABRT shows where every thread was
    code = Daemon(arguments.config, connect=arguments.connect).run()
    if code:
        # A call to libvirt cannot be cancelled, and python would wait for its thread for ever.
        sys.stderr.flush()
        os._exit(code)
    return code
