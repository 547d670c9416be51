"""The connection: SQLite or PostgreSQL by URL, its schema brought up to date, and writes that outlast a lock.

SQLite runs in WAL mode, so that readers and the one writer do not wait for each other; a write takes its lock at once (`BEGIN IMMEDIATE`),
since a lock that is taken later can fail with no wait at all. What is deleted is overwritten (`secure_delete`), and the log is emptied after
deletions (`shred`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from orchestration.errors import RequestError
from orchestration.serving.store.records import StoreBusy

BUSY_SECONDS = 2.0
"""How long SQLite itself waits for a lock before it says so; then the whole transaction is tried again."""
MIGRATION_LOCK = 0x63686174
"""PostgreSQL's advisory lock that keeps two services from migrating at once."""
AGAIN = {"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300"}
"""PostgreSQL's codes for conflicts, locks, and a server that stops, starts or is full."""
T = TypeVar("T")


def url_of(given: str) -> URL:
    """The URL of a store; a bare path is a SQLite file.

    Raises:
        RequestError: neither SQLite nor PostgreSQL.
    """
    try:
        url = make_url(given if "://" in given else f"sqlite:///{given}")
    except ArgumentError as cause:
        raise RequestError(
            f"store={given}: not a URL of a database; give sqlite:///path/to/file.db or postgresql://user@host/name"
        ) from cause
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise RequestError(
            f"store={url.render_as_string()}: the store is kept in SQLite (sqlite:///file.db) or PostgreSQL (postgresql://…)"
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise RequestError(f"store={given}: give the path of a file; a database in memory would be lost with the process")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def connected(url: URL) -> Engine:
    """An engine whose transactions begin as the module's docstring says.

    Raises:
        RequestError: the driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
        return engine
    try:
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except (ImportError, NoSuchModuleError) as cause:
        raise RequestError(f"store={url.render_as_string()}: its driver is not installed; pip install 'chatray[postgres]'") from cause


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin`, not by the driver
    for pragma in ("busy_timeout = 2000", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def settings_of_alembic() -> Config:
    """Where the migrations are, for alembic."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to a revision, up or (by name, or `base`) down; two services that start at once do it one after the other.

    Raises:
        RequestError: the store was made by a newer chatray, or cannot be reached.
    """
    config = settings_of_alembic()
    try:
        with engine.execution_options(writes=True).begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            (command.upgrade if revision == "head" else command.downgrade)(config, revision)
    except CommandError as cause:
        raise RequestError(
            f"store={engine.url.render_as_string()}: its schema is not one of this chatray's ({cause}); it was made by a newer version: "
            "update chatray, or give another store"
        ) from cause
    except SQLAlchemyError as cause:
        said = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        raise RequestError(f"store={engine.url.render_as_string()}: cannot be opened ({said})") from cause


def retried(engine: Engine, wait: float, work: Callable[[Session], T], writes: bool = True) -> T:
    """The result of one transaction, which is tried again while the database is locked or away.

    Args:
        wait: seconds after which it is given up.
        work: run anew each time; must give the same when it is run twice.

    Raises:
        StoreBusy: it stayed locked or away.
    """
    chosen = engine.execution_options(writes=True) if writes else engine
    until, pause = time.monotonic() + wait, 0.01
    while True:
        try:
            with Session(chosen, expire_on_commit=False) as session, session.begin():
                return work(session)
        except DBAPIError as cause:
            if not _passes(cause):
                raise
            if time.monotonic() > until:
                raise StoreBusy(f"the store stayed locked or away for {wait:g} s ({str(cause.orig).splitlines()[0]})") from cause
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(pause * 2, 0.5)


def _passes(error: DBAPIError) -> bool:
    """Whether the same transaction may succeed later."""
    if error.connection_invalidated:
        return True
    said = str(error.orig).lower()
    if isinstance(error, OperationalError) and ("locked" in said or "busy" in said):
        return True
    state = getattr(error.orig, "sqlstate", None)
    return state in AGAIN or (isinstance(error, OperationalError) and state is None and "connect" in said)


def shred(engine: Engine) -> None:
    """Empty SQLite's log, in which what was deleted may still stand. A reader that holds it lets it be until the next call."""
    if engine.dialect.name == "sqlite":
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            raw.close()
