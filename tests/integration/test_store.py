"""The store on SQLite and on a real PostgreSQL server: who may see what, what deletion leaves, and what a lock does."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from orchestration.errors import RequestError
from orchestration.serving.store import database, tables
from orchestration.serving.store.export import export, tell
from orchestration.serving.store.records import Audit, NotFound, Refused, StoreBusy
from orchestration.serving.store.store import Store
from tests import postgresql

SECRET = "Zeppelinschokolade"
ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"what is {SECRET}?"}]
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    folder = postgresql.binaries()
    if folder is None:
        message = "no PostgreSQL server to test with: make install-dev as root, or install your system's package postgresql"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with postgresql.server(folder) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    pattern, name = request.getfixturevalue("postgres"), f"store{next(NUMBERS)}"
    admin = create_engine(database.url_of(pattern.format("postgres")), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return pattern.format(name)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url)
    yield opened
    opened.close()


def answered(store: Store, owner: str, *answers: str, consent: bool = True) -> tuple[str, list[str]]:
    """A conversation with a prompt and its answers."""
    conversation = store.new_conversation(owner, title=f"about {SECRET}", consent=consent).id
    store.add_message(owner, conversation, "user", ASKED[1]["content"])
    return conversation, store.record_answer(owner, ASKED, answers, "model@1", conversation)


def everything(store: Store) -> str:
    """All rows of all tables as text."""
    with store.engine.connect() as connection:
        return json.dumps([[list(map(str, row)) for row in connection.execute(t.select())] for t in tables.Base.metadata.sorted_tables])


def test_migrations_go_up_and_down_and_make_the_tables_that_the_program_uses(url: str) -> None:
    engine = database.connected(database.url_of(url))
    try:
        database.migrate(engine)
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.Base.metadata) == []
        store = Store.open(url)
        kept = store.new_conversation("anna", title="kept")
        store.close()
        database.migrate(engine, "0001")
        assert "audits" not in inspect(engine).get_table_names()
        store = Store.open(url)  # up again, with what was there
        assert store.conversation("anna", kept.id).title == "kept"
        store.close()
        database.migrate(engine, "base")
        assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    finally:
        engine.dispose()


def test_a_store_of_a_newer_version_is_refused(url: str) -> None:
    Store.open(url).close()
    engine = create_engine(database.url_of(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(RequestError, match="newer version"):
        Store.open(url)


def test_two_services_that_start_at_once_both_find_the_tables(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(url), range(4)))
    ids = {store.new_conversation("anna").id for store in stores}
    assert {c.id for c in stores[0].conversations("anna")} == ids
    for store in stores:
        store.close()


def test_messages_come_back_in_order_and_an_edit_cuts_what_followed(store: Store) -> None:
    conversation = store.new_conversation("anna").id
    said = [store.add_message("anna", conversation, role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")]
    assert store.messages("anna", conversation) == said
    edited = store.replace_from("anna", conversation, said[2].id, "other words", extra={"edited": True})
    assert edited is not None
    assert store.messages("anna", conversation) == [*said[:2], edited]
    assert (edited.role, edited.position, edited.extra) == ("user", 2, {"edited": True})
    assert store.replace_from("anna", conversation, said[1].id) is None
    assert store.messages("anna", conversation) == said[:1]


def test_conversations_are_listed_newest_first_page_by_page(store: Store) -> None:
    made = [store.new_conversation("anna", title=str(n)) for n in range(5)]
    store.new_conversation("boris")
    first = store.conversations("anna", 2)
    second = store.conversations("anna", 3, first[-1].id)
    assert [*first, *second] == made[::-1]
    assert store.conversations("anna", 2, second[-1].id) == []


def test_another_owner_finds_nothing_by_any_method(store: Store) -> None:
    conversation, (first, second) = answered(store, "anna", "one", "two")
    message = store.messages("anna", conversation)[0].id
    given = store.add_feedback("anna", "thumbs", [first], "up").id
    before = everything(store)
    tries: list[Callable[[], Any]] = [
        lambda: store.conversation("eve", conversation),
        lambda: store.conversations("eve", 9, conversation),
        lambda: store.update_conversation("eve", conversation, title="mine"),
        lambda: store.delete_conversation("eve", conversation),
        lambda: store.messages("eve", conversation),
        lambda: store.add_message("eve", conversation, "user", "hi"),
        lambda: store.replace_from("eve", conversation, message, "hi"),
        lambda: store.record_answer("eve", ASKED, "x", "m", conversation),
        lambda: store.add_feedback("eve", "thumbs", [first], "down"),
        lambda: store.add_feedback("eve", "choice", [first, second], first),
        lambda: store.delete_feedback("eve", given),
    ]
    for attempt in tries:
        with pytest.raises(NotFound):
            attempt()
    assert store.conversations("eve") == store.feedback("eve") == store.feedback("eve", [first]) == []
    assert everything(store) == before
    own = store.new_conversation("eve").id
    with pytest.raises(NotFound):  # a message of another conversation
        store.replace_from("eve", own, message, "hi")


def test_feedback_said_again_replaces_and_comments_add_up(store: Store) -> None:
    _, (first, second) = answered(store, "anna", "one", "two")
    store.add_feedback("anna", "thumbs", [first], "up")
    last = [
        store.add_feedback("anna", "thumbs", [first], "down"),
        store.add_feedback("anna", "thumbs", [second], "up"),
        store.add_feedback("anna", "comment", [first], "too short"),
        store.add_feedback("anna", "comment", [first], "really"),
    ]
    store.add_feedback("anna", "choice", [first, second], first)
    last.append(store.add_feedback("anna", "choice", [second, first], second))
    assert store.feedback("anna") == last
    assert store.feedback("anna", [second]) == [last[1], last[4]]


def test_feedback_that_makes_no_sense_is_refused(store: Store) -> None:
    _, (first, second) = answered(store, "anna", "one", "two")
    (other,) = store.record_answer("anna", [{"role": "user", "content": "something else"}], "three", "model@1")
    wrong: list[tuple[Any, list[str], Any]] = [
        ("thumbs", [first], "sideways"), ("thumbs", [first, second], "up"), ("choice", [first], first), ("choice", [first, first], first),
        ("choice", [first, second], other), ("choice", [first, other], first), ("edit", [first], "  "), ("edit", [first], "a\0b"),
        ("stars", [first], "5"), ("edit", [first], "half \ud800"), ("comment", [], "x"),
    ]  # fmt: skip
    for kind, answers, value in wrong:
        with pytest.raises(Refused):
            store.add_feedback("anna", kind, answers, value)
    for attempt in (
        lambda: store.record_answer("anna", [{"role": "root", "content": "x"}], "x", "m"),
        lambda: store.record_answer("anna", [], "x", "m"),
        lambda: store.new_conversation(""),
        lambda: store.add_message("anna", store.new_conversation("anna").id, "user", "x", extra={"a": float("nan")}),
        lambda: store.add_message("anna", store.new_conversation("anna").id, "user", "x", extra={"a": "\0"}),
    ):
        with pytest.raises(Refused):
            attempt()
    assert store.feedback("anna") == []


def test_a_deleted_conversation_leaves_nothing_and_the_exported_copy_is_told(store: Store, tmp_path: Path) -> None:
    gone, (first, second) = answered(store, "anna", f"{SECRET} one", "two")
    other = store.record_answer("boris", [{"role": "user", "content": "stay"}], "with me", "model@1")
    stays = store.add_feedback("boris", "thumbs", other, "up", consent=True)
    given = [
        store.add_feedback("anna", "choice", [first, second], first, consent=True),
        store.add_feedback("anna", "edit", [second], f"{SECRET} two", consent=True),
        store.add_feedback("anna", "comment", [first], SECRET),
    ]
    store.audit(Audit("anna", "input", "warn", ("hate",), {"hate": 0.5}, "trained", gone))
    assert export(store, tmp_path / "out") == {"demonstrations/feedback.jsonl": 2, "comparisons/feedback.jsonl": 2}
    assert SECRET in (tmp_path / "out" / "comparisons" / "feedback.jsonl").read_text()
    deleted = store.delete_conversation("anna", gone)
    assert set(deleted.feedback) == {feedback.id for feedback in given}
    assert deleted.folders == (str((tmp_path / "out").resolve()),)
    assert SECRET not in everything(store)
    assert store.feedback("anna") == []
    assert store.feedback("boris") == [stays]
    assert [(a.action, a.conversation_id) for a in store.audits()] == [("warn", None)]
    assert tell(store) == []
    files = {file.name: file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert set(files) == {"feedback.jsonl", "feedback.json"}
    assert not (tmp_path / "out" / "comparisons" / "feedback.jsonl").exists()
    assert SECRET not in "".join(files.values())
    assert len(json.loads(files["feedback.json"])["withdrawn"]) == 3
    assert store.exports_to_tell() == {}


def test_a_copy_that_is_elsewhere_is_told_when_it_can_be_reached(store: Store, tmp_path: Path) -> None:
    _, (first,) = answered(store, "anna", "one")
    given = store.add_feedback("anna", "thumbs", [first], "up", consent=True)
    export(store, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "away")
    assert store.delete_feedback("anna", given.id).folders
    assert tell(store) == [str(tmp_path / "out")]
    (tmp_path / "away").rename(tmp_path / "out")
    assert tell(store) == []
    assert not (tmp_path / "out" / "demonstrations" / "feedback.jsonl").exists()


def test_feedback_taken_back_while_it_is_exported_does_not_stay_in_the_copy(store: Store, tmp_path: Path) -> None:
    _, (first,) = answered(store, "anna", "one")
    given = store.add_feedback("anna", "thumbs", [first], "up", consent=True)
    read = store.learnable()
    store.delete_feedback("anna", given.id)
    store.note_export(str(tmp_path / "out"), {"demonstrations.jsonl:row": [read[0].feedback.id]})
    assert store.exports_to_tell() == {str(tmp_path / "out"): ["demonstrations.jsonl:row"]}


def test_nothing_is_learned_from_without_consent(store: Store, tmp_path: Path) -> None:
    conversation, (first,) = answered(store, "anna", "one")
    _, (private,) = answered(store, "anna", "two", consent=False)
    store.add_feedback("anna", "thumbs", [private], "up", consent=True)
    store.add_feedback("anna", "edit", [first], "better")
    assert store.learnable() == []
    store.add_feedback("anna", "edit", [first], "better", consent=True)
    assert [item.texts for item in store.learnable()] == [("one",)]
    export(store, tmp_path / "out")
    store.update_conversation("anna", conversation, consent=False)
    assert store.learnable() == []
    assert tell(store) == []
    assert [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()] == ["feedback.json"]


def test_an_owner_who_leaves_is_forgotten(store: Store) -> None:
    _, (first,) = answered(store, "anna", SECRET)
    store.record_answer("anna", ASKED, SECRET, "model@1")
    store.add_feedback("anna", "comment", [first], SECRET)
    store.audit(Audit("anna", "output", "block", ("hate",), {"hate": 0.9}, "trained"))
    store.new_conversation("boris")
    store.delete_owner("anna")
    assert "anna" not in everything(store)
    assert SECRET not in everything(store)
    assert len(store.conversations("boris")) == 1


def test_the_last_feedback_on_an_answer_of_no_conversation_takes_its_texts_along(store: Store) -> None:
    (answer,) = store.record_answer("anna", ASKED, SECRET, "model@1")
    thumb, comment = (store.add_feedback("anna", *said) for said in (("thumbs", [answer], "up"), ("comment", [answer], "so good")))
    store.delete_feedback("anna", thumb.id)
    assert SECRET in everything(store)
    store.delete_feedback("anna", comment.id)
    assert SECRET not in everything(store)
    with pytest.raises(NotFound):
        store.add_feedback("anna", "thumbs", [answer], "up")


def test_an_answer_of_a_conversation_stays_when_its_feedback_goes(store: Store) -> None:
    _, (answer,) = answered(store, "anna", "one")
    given = store.add_feedback("anna", "thumbs", [answer], "up")
    store.delete_feedback("anna", given.id)
    assert store.add_feedback("anna", "thumbs", [answer], "down").value == "down"


def test_many_threads_write_one_conversation_without_losing_a_message(store: Store) -> None:
    conversation = store.new_conversation("anna").id
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.add_message("anna", conversation, "user", str(n)), range(40)))
    found = store.messages("anna", conversation)
    assert [message.position for message in found] == list(range(40))
    assert {message.content for message in found} == {str(n) for n in range(40)}


def test_feedback_waits_for_a_lock_and_is_not_lost(store: Store) -> None:
    _, (first,) = answered(store, "anna", "one")
    asked = threading.Event()

    def give() -> Any:
        asked.set()
        return store.add_feedback("anna", "thumbs", [first], "up")

    with store.engine.execution_options(writes=True).connect() as other, ThreadPoolExecutor(1) as pool:
        lock = other.begin()
        other.execute(text("DELETE FROM feedback"))
        if store.engine.dialect.name == "postgresql":
            other.execute(text("LOCK TABLE feedback IN ACCESS EXCLUSIVE MODE"))
        waiting = pool.submit(give)
        asked.wait()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        lock.commit()
        given = waiting.result(timeout=30)
    assert store.feedback("anna") == [given]


def test_a_lost_connection_is_made_anew(store: Store) -> None:
    conversation = store.new_conversation("anna").id
    if store.engine.dialect.name == "postgresql":
        with store.engine.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
                )
            )
            connection.rollback()
    else:
        store.engine.dispose()
    assert store.conversation("anna", conversation).id == conversation


def test_a_store_that_stays_locked_says_so_and_writes_nothing(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store.db"), wait=0.0)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreBusy, match="stayed locked"):
        store.new_conversation("anna")
    other.execute("ROLLBACK")
    other.close()
    assert store.conversations("anna") == []
    store.close()


def test_what_is_deleted_is_in_none_of_sqlites_files(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store.db"))
    conversation, answers = answered(store, "anna", f"{SECRET} {'x' * 9000}")
    store.add_feedback("anna", "edit", answers, SECRET * 3)

    def found() -> list[str]:
        return [file.name for file in tmp_path.iterdir() if SECRET.encode() in file.read_bytes()]

    assert found()
    store.delete_conversation("anna", conversation)
    assert found() == []
    store.close()
    assert found() == []


@pytest.mark.parametrize("given", ["mysql://host/x", "sqlite://", "nonsense://x", "sqlite:///:memory:", "://"])
def test_other_databases_are_refused(given: str) -> None:
    with pytest.raises(RequestError, match="store="):
        Store.open(given)


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(RequestError, match="cannot be opened") as caught:
        Store.open("postgresql://anna:geheim@127.0.0.1:1/none")
    assert "geheim" not in str(caught.value)
