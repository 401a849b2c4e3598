"""The command line: exit codes, and which module answers. Each command's imports happen when it is used."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from kvmsnapd.cli.parser import make_parser
from kvmsnapd.errors import ConfigError, HypervisorUnreachableError, InvalidValueError, KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_CONFIG = 1, 2, 3, 78


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected error becomes one message on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be anything
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, and nobody should wait for the import else
        import_module("kvmsnapd.cli.completion").complete(parser)
    arguments = parser.parse_args(argv)
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
