"""``kvmsnapd run``."""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import TYPE_CHECKING

from kvmsnapd.daemon import Daemon

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground until it is told to stop."""
    faulthandler.enable()  # a watchdog's SIGABRT shows where every thread was
    code = Daemon(arguments.config, connect=arguments.connect).run()
    if code:
        # A call to libvirt cannot be cancelled, and python would wait for its thread for ever.
        sys.stderr.flush()
        os._exit(code)
    return code
