"""From the words of a command line to the domain and the snapshot that are meant."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from kvmsnapd.errors import DomainNotFoundError, InvalidValueError, SnapshotNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.model import Inventory, Snapshot

_MOST_NAMED = 5
NEWEST = "newest"


def find_domain(domains: Iterable[Inventory], word: str) -> Inventory:
    """Return the domain of this name or UUID; raise DomainNotFoundError, which names the nearest one, if none is."""
    known = list(domains)
    for domain in known:
        if word == domain.name or word.lower() == domain.uuid:
            return domain
    close = get_close_matches(word, [domain.name for domain in known], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; `kvmsnapd status` lists all"
    msg = f"libvirt has no domain {word!r}{hint}"
    raise DomainNotFoundError(msg, operation="lookup", domain=word)


def find_snapshot(domain: Inventory, word: str) -> Snapshot:
    """Return the snapshot of this name, the only one with this part of a name, or the newest of ours.

    Raises:
        SnapshotNotFoundError: there is none; it names the nearest one.
        InvalidValueError: the part fits several, which it names.
    """
    exact = next((s for s in domain.snapshots if s.name == word), None)
    if exact:
        return exact
    if word == NEWEST:
        own = [(s.mark.good_at(s.mark.taken_at), s) for s in domain.snapshots if s.mark and not s.mark.deleting]
        if own:
            return max(own, key=lambda entry: entry[0])[1]
    fitting = sorted((s for s in domain.snapshots if word and word in s.name), key=lambda s: s.name)
    if len(fitting) == 1:
        return fitting[0]
    look = f"`kvmsnapd list {domain.name}` shows all"
    if fitting:
        named = ", ".join(s.name for s in fitting[:_MOST_NAMED])
        more = f" and {len(fitting) - _MOST_NAMED} more" if len(fitting) > _MOST_NAMED else ""
        msg = f"{word!r} fits {len(fitting)} snapshots of {domain.name}: {named}{more}; write more of the name"
        raise InvalidValueError(msg)
    close = get_close_matches(word, [s.name for s in domain.snapshots], n=1)
    hint = f"did you mean {close[0]!r}? {look}" if close else look
    msg = f"{domain.name} has no snapshot {word!r}; {hint}"
    raise SnapshotNotFoundError(msg, operation="lookup", domain=domain.name)
