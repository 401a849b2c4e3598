"""``kvmsnapd completion``, and the answers when a shell asks what a word could be."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import argcomplete
from argcomplete.shell_integration import shellcode

from kvmsnapd.errors import KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.config import Config
    from kvmsnapd.model import Inventory


def completion(arguments: argparse.Namespace) -> int:
    """Print the shell's part of it."""
    print(shellcode(["kvmsnapd"], shell=arguments.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process."""
    completers = {"domain": _domains, "domains": _domains, "snapshot": _snapshots, "policy": _policies}
    for action in _arguments(parser):
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001  # there is no other way to them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _arguments(command)
        else:
            yield action


def _quietly(find: Callable[[argparse.Namespace], list[str]]) -> Callable[..., list[str]]:
    """Return a completer: one that knows nothing says nothing, since a message would spoil the line."""

    def completer(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
        try:
            return find(parsed_args)
        except (KvmsnapdError, OSError):
            return []

    return completer


@_quietly
def _domains(arguments: argparse.Namespace) -> list[str]:
    return [domain.name for domain in _inventory(arguments)]


@_quietly
def _snapshots(arguments: argparse.Namespace) -> list[str]:
    return ["newest", *(s.name for d in _inventory(arguments) if d.name == arguments.domain for s in d.snapshots)]


@_quietly
def _policies(arguments: argparse.Namespace) -> list[str]:
    return list(_config(arguments).policies)


def _config(arguments: argparse.Namespace) -> Config:
    from kvmsnapd.config import load_config  # noqa: PLC0415  # only what is asked for

    return load_config(arguments.config)


def _inventory(arguments: argparse.Namespace) -> tuple[Inventory, ...]:
    from kvmsnapd.libvirt_host import LibvirtHost  # noqa: PLC0415  # only what is asked for

    host = LibvirtHost(arguments.connect or _config(arguments).settings.connect)
    try:
        return host.inventory()
    finally:
        host.close()
