"""``kvmsnapd run``."""

from __future__ import annotations

import faulthandler
from typing import TYPE_CHECKING

from kvmsnapd.daemon import Daemon

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground until it is told to stop."""
    faulthandler.enable()  # a watchdog's SIGABRT shows where every thread was
    return Daemon(arguments.config, connect=arguments.connect).run()
