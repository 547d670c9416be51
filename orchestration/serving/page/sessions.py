"""Who a browser is. Where the service has keys, a key is given once; what is kept is whose it was, in this process's memory alone."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestration.serving.keys import Owner
from orchestration.serving.service import Service

IDLE_SECONDS = 12 * 3600
MOST = 10_000
"""Sessions that are remembered at once; the one that was idle longest is forgotten first."""


class Sessions:
    """From a browser's session, which a signed cookie names, to the owner of a key."""

    def __init__(self, service: Callable[[], Service], clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self.clock = service, clock
        self.owners: dict[str, tuple[Owner, float]] = {}

    @property
    def service(self) -> Service:
        return self._service()

    @property
    def needs_key(self) -> bool:
        return self.service.keys.entries is not None

    def sign_in(self, session: str, key: str) -> Owner:
        """Raises:
        ApiError: 401, no such key.
        """
        owner = self.service.keys.owner(f"Bearer {key}")
        self.owners.pop(session, None)
        while len(self.owners) >= MOST:
            self.owners.pop(next(iter(self.owners)))
        self.owners[session] = owner, self.clock()
        return owner

    def sign_out(self, session: str) -> None:
        self.owners.pop(session, None)

    def owner(self, session: str) -> Owner | None:
        """Whose session it is; None: a key is needed. A key that was taken out of the file ends its sessions."""
        if not self.needs_key:
            return self.service.keys.everybody
        owner, seen = self.owners.pop(session, (None, 0.0))
        if owner is None or self.clock() - seen > IDLE_SECONDS:
            return None
        current = next((known for _, known in self.service.keys.entries or [] if known.id == owner.id), None)
        if current is not None:
            self.owners[session] = current, self.clock()
        return current
