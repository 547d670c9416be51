"""The store of the chat service: conversations, answers, feedback and audits, in SQLite or PostgreSQL.

Synchronous; the service calls it in a thread, from as many as it likes. Each method is one transaction. A database that is locked or away is
tried again for `wait` seconds, then `StoreBusy` is raised and nothing was written.
"""

from __future__ import annotations

from orchestration.serving.store.answers import Answers
from orchestration.serving.store.audits import Audits
from orchestration.serving.store.conversations import Conversations
from orchestration.serving.store.database import connected, migrate, shred, url_of

WAIT = 15.0


class Store(Audits, Conversations, Answers):
    """An open store."""

    @classmethod
    def open(cls, url: str, wait: float = WAIT) -> Store:
        """Open a store, make it if there is none, and bring its schema up to date.

        Args:
            url: `sqlite:///path` (or a bare path), or `postgresql://user:password@host/name`.
            wait: seconds for which a locked or lost database is tried again.

        Raises:
            RequestError: no such database, another kind of one, or one of a newer chatray.
        """
        engine = connected(url_of(url))
        try:
            migrate(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, wait)

    def close(self) -> None:
        shred(self.engine)
        self.engine.dispose()
