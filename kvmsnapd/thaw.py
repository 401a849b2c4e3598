"""Thaw guests that a call which broke may have left frozen, for as long as it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.errors import DomainLockedError, DomainNotFoundError, GuestAgentRefusedError, HypervisorError
from kvmsnapd.events import DomainThawed, ThawFailed
from kvmsnapd.model import DomainState

if TYPE_CHECKING:
    from kvmsnapd.events import Publish
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.state_files import DomainLocks, FreezeIntents


@dataclass
class Thawer:
    """Clears freeze intents, each only once its domain is known not to be frozen. Safe to call from several threads."""

    hypervisor: Hypervisor
    locks: DomainLocks
    intents: FreezeIntents
    publish: Publish
    # Why a domain could not be thawed yet, so that the same words are published once.
    _not_thawed: dict[str, str] = field(default_factory=dict)

    def thaw_all(self) -> None:
        """Thaw every domain with a freeze intent; may take as long as agents take to answer, or not to."""
        for uuid in self.intents.outstanding():
            try:
                with self.locks.hold(uuid, wait=timedelta(0), doing="thaw"):
                    self.thaw(uuid)
            except DomainLockedError:
                continue  # a take is in flight there, and its own end clears the intent

    def thaw(self, uuid: str) -> None:
        """Thaw one domain and clear its intent; an agent that does not answer leaves the intent for later."""
        name = None
        try:
            domain = self.hypervisor.domain(uuid)
            name = domain.name
            # A guest that does not run is not frozen; a later start begins thawed.
            if domain.state is not DomainState.SHUT_OFF:
                self.hypervisor.thaw(uuid)
        except DomainNotFoundError:
            pass  # gone
        except HypervisorError as error:
            if isinstance(error, GuestAgentRefusedError) and self._knows_itself_thawed(uuid):
                # Its agent has no thaw, and answers as one does that is not frozen.
                self._not_thawed.pop(uuid, None)
                self.intents.clear(uuid)
                return
            if self._not_thawed.get(uuid) != str(error):
                self._not_thawed[uuid] = str(error)
                self.publish(ThawFailed(domain=name, domain_uuid=uuid, error=str(error)))
            return
        self._not_thawed.pop(uuid, None)
        self.intents.clear(uuid)
        self.publish(DomainThawed(domain=name, domain_uuid=uuid))

    def _knows_itself_thawed(self, uuid: str) -> bool:
        """Ask the agent what a frozen one refuses to answer."""
        try:
            self.hypervisor.filesystems(uuid)
        except HypervisorError:
            return False
        return True
