"""``kvmsnapd manual``: the manual page, made from the parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from argparse_manpage.manpage import Manpage

from kvmsnapd import __version__
from kvmsnapd.cli.parser import make_parser

if TYPE_CHECKING:
    import argparse


def manual(_arguments: argparse.Namespace) -> int:
    """Print the page, as man(1) reads it."""
    parser = make_parser()
    page = Manpage(parser, format="single-commands-section")
    page.section, page.source, page.manual = 8, f"kvmsnapd {__version__}", "System administration"
    page.description = "snapshots of libvirt domains, on schedule"
    print(page)
    return 0
