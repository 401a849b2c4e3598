"""The words of the command line: every command with its arguments, and the function that answers it.

Help, manual pages and completion are all made from this one parser. It imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmsnapd import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

_EXIT_CODES = """exit codes: 0 done, 1 a domain failed or a check found something, 2 usage, 3 libvirt unreachable,
78 bad configuration"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; its result has ``answer``, the module below kvmsnapd.cli and the function to call."""
    parser = argparse.ArgumentParser(
        prog="kvmsnapd", description="Takes and prunes libvirt snapshots on schedule.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"kvmsnapd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    add = _Adder(commands)
    _add_service(add)
    _add_views(add)
    _add_actions(add)
    _add_ways_back(add)
    return parser


class _Adder:
    """Adds commands that share the common options."""

    def __init__(self, commands: Any) -> None:  # noqa: ANN401  # argparse keeps the type to itself
        self._commands = commands
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument(
            "--config",
            type=Path,
            default=Path("/etc/kvmsnapd/kvmsnapd.yaml"),
            metavar="FILE",
            help="configuration file (default: %(default)s)",
        )
        self._common.add_argument("--connect", metavar="URI", help="libvirt to use, instead of the configured one")
        self._table = argparse.ArgumentParser(add_help=False)
        self._table.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def __call__(
        self, name: str, answer: tuple[str, str], summary: str, more: str, *, json: bool = False
    ) -> argparse.ArgumentParser:
        parents = [self._common, *([self._table] if json else [])]
        command: argparse.ArgumentParser = self._commands.add_parser(
            name, help=summary, description=f"{summary} {more}", epilog=_EXIT_CODES, parents=parents
        )
        command.set_defaults(answer=answer)
        return command


def _add_service(add: Callable[..., argparse.ArgumentParser]) -> None:
    add("run", ("run", "run"), "Run the daemon.", "SIGHUP reloads the configuration, SIGTERM ends it.")
    check = add(
        "check-config",
        ("check", "check_config"),
        "Check the configuration.",
        "Reads the files only; with --connect also compares them with the domains of that libvirt. Changes nothing.",
        json=True,
    )
    check.add_argument(
        "--resolved",
        nargs="*",
        metavar="DOMAIN",
        help="print what applies to these domains, or to all, and the place each value comes from",
    )
    init = add(
        "init",
        ("init", "init"),
        "Propose a configuration for the domains that are here.",
        "Prints it with comments, as the daemon itself would decide what can be taken of each. Writes only when told.",
    )
    init.add_argument(
        "--write",
        action="store_true",
        help="write it to the configuration file, unless there is another one than the shipped one",
    )
    add("schema", ("check", "schema"), "Print the JSON Schema of the configuration.", "For editors and checkers.")
    add("manual", ("manual", "manual"), "Print the manual page.", "To read it: kvmsnapd manual | man -l -")
    completion = add(
        "completion",
        ("completion", "completion"),
        "Print what makes a shell complete commands, domains, snapshots and policies.",
        "For bash: kvmsnapd completion bash >/etc/bash_completion.d/kvmsnapd",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="which shell")


def _add_views(add: Callable[..., argparse.ArgumentParser]) -> None:
    domains = "names or UUIDs (default: all)"
    status = add(
        "status",
        ("status", "show_status"),
        "Show every domain and policy, worst first.",
        "Works with the daemon stopped, and says so. Changes nothing.",
        json=True,
    )
    status.add_argument("domains", nargs="*", metavar="DOMAIN", help=domains)
    status.add_argument(
        "--watch",
        nargs="?",
        type=int,
        const=5,
        metavar="SECONDS",
        help="show it anew every so many seconds (%(const)s) until Ctrl-C",
    )
    listing = add(
        "list",
        ("listing", "show_list"),
        "List snapshots, own and foreign, as the tree they are, with the reasons they stay.",
        "Changes nothing.",
        json=True,
    )
    listing.add_argument("domains", nargs="*", metavar="DOMAIN", help=domains)
    plan = add(
        "plan",
        ("foresee", "show_plan"),
        "Show what the next run would take and delete, and why.",
        "With --config naming another file than the running daemon's: what that edit would change. "
        "Takes and deletes nothing.",
        json=True,
    )
    plan.add_argument("domains", nargs="*", metavar="DOMAIN", help=domains)
    add(
        "doctor",
        ("doctor", "doctor"),
        "Look at libvirt, every domain, its snapshots and their files, and say what is wrong.",
        "Names the command that ends each finding; repairs nothing. Exits with 1 if there is something to look at.",
        json=True,
    )
    simulate = add(
        "simulate",
        ("simulate", "simulate"),
        "Show what keep rules do.",
        "With --keep: reads one ISO 8601 time a line and prints the verdict for each, newest first. With --policy: "
        "draws the future of a configured policy. Needs no libvirt and changes nothing.",
        json=True,
    )
    rules = simulate.add_mutually_exclusive_group(required=True)
    rules.add_argument("--keep", metavar="RULES", help='such as "last=2 daily=7 weekly=all within=36h"')
    rules.add_argument("--policy", metavar="NAME", help="a policy of the configuration file")
    simulate.add_argument("--timezone", metavar="TZ", help="calendar for --keep, and for times without an offset (UTC)")
    simulate.add_argument("--now", "--from", metavar="TIME", help="the present instant, instead of the clock's")
    span = simulate.add_mutually_exclusive_group()
    span.add_argument("--days", type=int, default=30, metavar="N", help="with --policy (default: %(default)s)")
    span.add_argument("--until", metavar="WHEN", help="with --policy: a date, or a length such as 12w, 6mo or 10y")
    simulate.add_argument("file", nargs="?", default="-", metavar="FILE", help="times for --keep; - is standard input")


def _add_actions(add: Callable[..., argparse.ArgumentParser]) -> None:
    take = add(
        "take",
        ("take", "take"),
        "Take a snapshot now.",
        "Goes by the domain's policy, and waits for the daemon if it works on the domain.",
        json=True,
    )
    take.add_argument("domains", nargs="+", metavar="DOMAIN", help="names or UUIDs")
    take.add_argument("--policy", metavar="POLICY", help="which one, for a domain with several")
    take.add_argument("--hold", metavar="REASON", help="keep it until it is released")
    prune = add(
        "prune",
        ("prune", "prune"),
        "Delete what retention releases, now.",
        "Shows the plan and asks. Goes past max_deletes_per_run, which a person has to do.",
        json=True,
    )
    prune.add_argument("domains", nargs="*", metavar="DOMAIN", help="names or UUIDs (default: all)")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    hold = add("hold", ("hold", "hold"), "Keep a snapshot, whatever retention says, until its release.", "", json=True)
    _add_snapshot(hold)
    hold.add_argument("reason", metavar="REASON", help="why, for whoever finds it")
    hold.add_argument("--until", metavar="TIME", help="ISO 8601 time or a duration such as 14d; then it ends by itself")
    release = add("release", ("hold", "release"), "Give a held snapshot back to retention.", "", json=True)
    _add_snapshot(release)
    forget = add(
        "forget",
        ("forget", "forget"),
        "Delete all that kvmsnapd made for a domain, before it is undefined or moved.",
        "Its disks are merged to where they were. Foreign snapshots stay.",
        json=True,
    )
    forget.add_argument("domain", metavar="DOMAIN", help="name or UUID")
    forget.add_argument("--policy", metavar="POLICY", help="only the snapshots of this one")
    forget.add_argument("--yes", action="store_true", help="do not ask")


def _add_ways_back(add: Callable[..., argparse.ArgumentParser]) -> None:
    restore = add(
        "restore",
        ("restore", "restore"),
        "Go back to a snapshot, or make a second domain from it.",
        "In place: shows what will be lost, asks, keeps the present state, and goes back; called again it finishes "
        "what was interrupted. With --as: the domain itself is not touched.",
        json=True,
    )
    _add_snapshot(restore)
    restore.add_argument("--yes", action="store_true", help="do not ask")
    restore.add_argument("--discard-current", action="store_true", help="do not keep the present state")
    restore.add_argument("--power-off", action="store_true", help="pull the plug of a guest that does not shut down")
    restore.add_argument("--start", action=argparse.BooleanOptionalAction, help="afterwards (default: as before)")
    restore.add_argument("--abandon", action="store_true", help="take back one that was cut off before it went back")
    restore.add_argument("--as", dest="as_name", metavar="NAME", help="make a second domain of this name instead")
    restore.add_argument("--linked", action="store_true", help="with --as: a thin overlay, not a copy")
    restore.add_argument("--network", action="store_true", help="with --as: keep its network interfaces")
    export = add(
        "export",
        ("copy", "export"),
        "Copy a snapshot's disks as stand-alone qcow2 files.",
        "Each file has all of its disk's data. The domain may run.",
        json=True,
    )
    _add_snapshot(export)
    export.add_argument("--files", required=True, metavar="DIR", help="an existing directory that libvirt may write to")
    verify = add(
        "verify",
        ("verify", "verify"),
        "Boot a throw-away copy of a snapshot, without network, and see whether it comes up.",
        "The domain itself is not touched; nothing is left.",
        json=True,
    )
    _add_snapshot(verify, optional=True)


def _add_snapshot(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    command.add_argument("domain", metavar="DOMAIN", help="name or UUID")
    command.add_argument(
        "snapshot",
        metavar="SNAPSHOT",
        nargs="?" if optional else None,
        help="its name, any part of it that fits one snapshot only, or `newest`" + (" (default)" if optional else ""),
    )
