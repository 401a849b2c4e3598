"""The command line: arguments, exit codes, and which module answers. Each command's imports happen when it is used."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd import __version__
from kvmsnapd.errors import ConfigError, HypervisorUnreachableError, InvalidValueError, KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_CONFIG = 1, 2, 3, 78

_EXIT_CODES = """exit codes: 0 done, 1 a domain failed or a check found something, 2 usage, 3 libvirt unreachable,
78 bad configuration"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected error becomes one message on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be anything
    arguments = _parser().parse_args(argv)
    module, function = arguments.answer
    try:
        answer = getattr(import_module(f"kvmsnapd.cli.{module}"), function)
        code: int = answer(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except InvalidValueError as error:
        print(f"kvmsnapd: {error}", file=sys.stderr)
        return EXIT_USAGE
    except HypervisorUnreachableError as error:
        print(f"kvmsnapd: {error}; is libvirtd running? Nothing was changed.", file=sys.stderr)
        return EXIT_UNREACHABLE
    except KvmsnapdError as error:
        print(f"kvmsnapd: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of a pipe went away; python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmsnapd", description="Takes and prunes libvirt snapshots on schedule.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"kvmsnapd {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        type=Path,
        default=Path("/etc/kvmsnapd/kvmsnapd.yaml"),
        metavar="FILE",
        help="configuration file (default: %(default)s)",
    )
    common.add_argument("--connect", metavar="URI", help="libvirt to use, instead of the configured one")
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, answer: tuple[str, str], summary: str, more: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=f"{summary} {more}", epilog=_EXIT_CODES, parents=[common, *parents]
        )
        command.set_defaults(answer=answer)
        return command

    add("run", ("run", "run"), "Run the daemon.", "SIGHUP reloads the configuration, SIGTERM ends it.")
    check = add(
        "check-config",
        ("check", "check_config"),
        "Check the configuration.",
        "Reads the files only; with --connect also compares them with the domains of that libvirt. Changes nothing.",
        table,
    )
    check.add_argument(
        "--resolved",
        nargs="*",
        metavar="DOMAIN",
        help="print what applies to these domains, or to all, and the place each value comes from",
    )
    add("schema", ("check", "schema"), "Print the JSON Schema of the configuration.", "For editors and checkers.")
    for name, summary, more in (
        ("status", "Show every domain and policy, worst first.", "Works with the daemon stopped. Changes nothing."),
        ("list", "List snapshots, own and foreign, with the reasons they stay.", "Changes nothing."),
        ("plan", "Show what the next run would take and delete, and why.", "Takes and deletes nothing."),
    ):
        command = add(name, ("inspect", f"show_{name}"), summary, more, table)
        command.add_argument("domains", nargs="*", metavar="DOMAIN", help="names or UUIDs (default: all)")
    add(
        "doctor",
        ("doctor", "doctor"),
        "Look at libvirt, every domain, its snapshots and their files, and say what is wrong.",
        "Names the command that ends each finding; repairs nothing. Exits with 1 if there is something to look at.",
        table,
    )
    simulate = add(
        "simulate",
        ("simulate", "simulate"),
        "Show what keep rules do.",
        "With --keep: reads one ISO 8601 time a line and prints the verdict for each, newest first. With --policy: "
        "draws the future of a configured policy. Needs no libvirt and changes nothing.",
        table,
    )
    rules = simulate.add_mutually_exclusive_group(required=True)
    rules.add_argument("--keep", metavar="RULES", help='such as "last=2 daily=7 weekly=all within=36h"')
    rules.add_argument("--policy", metavar="NAME", help="a policy of the configuration file")
    simulate.add_argument("--timezone", metavar="TZ", help="calendar for --keep, and for times without an offset (UTC)")
    simulate.add_argument("--now", metavar="TIME", help="the present instant, instead of the clock's")
    simulate.add_argument("--days", type=int, default=30, metavar="N", help="with --policy (default: %(default)s)")
    simulate.add_argument("file", nargs="?", default="-", metavar="FILE", help="times for --keep; - is standard input")
    return parser
