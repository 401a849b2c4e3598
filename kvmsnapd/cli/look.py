"""What the commands look at: the configuration in force, whether a daemon runs, and the domains of one libvirt."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmsnapd.cli.find import find_domain
from kvmsnapd.config import fingerprint, load_config, load_contents, runtime_directory_of
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import ConfigError
from kvmsnapd.fleet import survey
from kvmsnapd.live_config import contents_of, may_look, read_note

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from kvmsnapd.config import Config
    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.libvirt_host import LibvirtHost
    from kvmsnapd.model import Inventory


@dataclass(frozen=True)
class InForce:
    """A configuration, and what is known of the daemon."""

    config: Config
    note: dict[str, Any] | None = None
    """What the running daemon has noted, if the configuration is the one that it goes by."""
    said: list[str] = field(default_factory=list)
    """What has to be said of the configuration: that an edit was refused, or waits for a reload."""
    other: str | None = None
    """The file by which a daemon runs that does not go by this configuration."""
    hidden: bool = False
    """Whether we may not see if a daemon runs."""

    def describe(self) -> str:
        """Return one sentence on the daemon."""
        if self.note:
            return (
                f"The daemon runs (process {self.note['pid']}) by {self.config.path}, as read at "
                f"{self.note['loaded_at']}."
            )
        if self.other:
            return f"A daemon runs by {self.other}; this is by {self.config.path}, which it does not read."
        if self.hidden:
            return (
                f"Whether the daemon runs cannot be told: {self.config.runtime_directory} is closed to us. This is by "
                f"{self.config.path} and libvirt; root sees more."
            )
        return (
            f"The daemon does not run: this is by {self.config.path} and libvirt, and the next runs begin only once it "
            "is started (systemctl start kvmsnapd)."
        )


@dataclass(frozen=True)
class Sight:
    """All domains that were asked for, as they are now."""

    fleet: Fleet
    domains: tuple[Inventory, ...]
    pairs: tuple[Pair, ...]
    now: datetime


def look(config: Config, host: LibvirtHost, words: Sequence[str] = ()) -> Sight:
    """Look at the domains of these names or UUIDs, or at all.

    Raises:
        DomainNotFoundError: there is none of such a name.
        HypervisorUnreachableError: libvirt does not answer.
    """
    now = read_clock()
    fleet = survey(config.expected_policies, config.selectors, host.inventory(), now=now)
    wanted = {find_domain(fleet.domains, word).uuid for word in words} or {d.uuid for d in fleet.domains}
    domains = tuple(domain for domain in fleet.domains if domain.uuid in wanted)
    return Sight(fleet, domains, tuple(pair for pair in fleet.pairs if pair.name.domain_uuid in wanted), now)


def config_in_force(path: Path) -> InForce:
    """Return the configuration that the running daemon made of this file; without such a daemon that of the file.

    Raises:
        ConfigError: no daemon goes by it, and it is not valid.
    """
    config, refused = None, None
    try:
        config = load_config(path)
    except ConfigError as error:
        refused = error
    directory = config.runtime_directory if config else runtime_directory_of(path)
    note = read_note(path, directory)
    if note is None:
        if refused or config is None:
            raise refused or ConfigError([])
        other = read_note(None, directory)
        return InForce(config, other=other["path"] if other else None, hidden=not may_look(directory))
    said = []
    if note["rejected"]:
        said = [f"The daemon refused an edit, and goes on with what it read at {note['loaded_at']}:", *note["rejected"]]
    elif config is None or fingerprint(config.contents) != fingerprint(contents_of(note)):
        said = [f"The files were edited since the daemon read them at {note['loaded_at']}; it is to be reloaded."]
    take_environment(note)
    return InForce(load_contents(contents_of(note)), note, said)


def config_beside_daemon(path: Path) -> tuple[Config, InForce | None]:
    """Return the configuration of a file as a daemon would read it, and what a running daemon has in force.

    The second is None where no daemon runs in the file's runtime directory, or we may not look.

    Raises:
        ConfigError: the file is not valid.
    """
    config = load_config(path)
    note = read_note(None, config.runtime_directory)
    if note is None:
        return config, None
    take_environment(note)
    return load_config(path), InForce(load_contents(contents_of(note)), note)


def take_environment(note: dict[str, Any]) -> None:
    """Let this process have the settings of the daemon's environment, and no others."""
    for name in [name for name in os.environ if name.upper().startswith("KVMSNAPD_")]:
        del os.environ[name]
    os.environ.update(note["environment"])
