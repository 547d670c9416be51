"""What forms and bodies leave room for: every list and text has an end, and one mistake is enough to refuse a body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from pydantic import BaseModel, TypeAdapter, ValidationError

from conf.serving import Limits
from orchestration.serving.api import feedback, forms, routes
from orchestration.serving.api.reading import PARTS, VALUES, read_json
from orchestration.serving.app import create_app
from orchestration.serving.stopping import Stops
from tests.serving_stand_ins import ScriptedEngine, served, service, settings

MIB = 2**20
FORMS: list[type[BaseModel]] = [
    forms.ChatForm, forms.CompletionForm, forms.ModerationForm, feedback.FeedbackForm, routes.NewConversation, routes.ConversationChange,
]  # fmt: skip
COUNTED = {"content", "text", "prompt", "input", "value", "answers"}
"""Texts that are as long as `serving.limits.characters` allows."""
WRONG: dict[str, Any] = {"numbers": [1.5] * 200_000, "objects": [{}] * 200_000, "texts": [""] * 200_000, "nothing": [None] * 200_000}


def described() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of the API's description with the name of the field it belongs to."""

    def below(name: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(schema, dict):
            if "type" in schema and isinstance(schema["type"], str):
                yield name, schema
            for key, inner in schema.items():
                if key == "properties":
                    for field, found in inner.items():
                        yield from below(field, found)
                elif key not in ("enum", "const", "default", "example"):
                    yield from below(name, inner)
        elif isinstance(schema, list):
            for inner in schema:
                yield from below(name, inner)

    api = create_app().openapi()
    for form in FORMS:
        yield from below(form.__name__, form.model_json_schema())
    for path in api["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                yield from below(parameter["name"], parameter["schema"])


def test_every_form_is_looked_at() -> None:
    api = create_app().openapi()
    bodies = [operation["requestBody"] for path in api["paths"].values() for operation in path.values() if "requestBody" in operation]
    named = {body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1] for body in bodies}
    assert named == {form.__name__ for form in FORMS}


def test_every_list_and_every_text_has_a_longest_length() -> None:
    found = list(described())
    assert {schema["type"] for _, schema in found} >= {"array", "string"}
    for name, schema in found:
        if schema["type"] == "array":
            assert schema.get("maxItems"), f"{name}: {schema}"
        if schema["type"] == "string" and not {"enum", "const", "maxLength", "pattern"} & schema.keys():
            assert name in COUNTED, f"{name}: {schema}"


def fields(form: type[BaseModel]) -> list[tuple[str, str]]:
    """The fields that take a list, and those of the forms in them."""
    found = []
    for name, schema in form.model_json_schema()["properties"].items():
        if "array" in json.dumps(schema):
            found.append((form.__name__, name))
    return found


LISTS = [field for form in (*FORMS, forms.ChatMessage) for field in fields(form)]


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize(("form", "field"), LISTS)
def test_a_list_is_refused_at_its_first_mistake(form: str, field: str, what: str) -> None:
    model: type[BaseModel] = getattr(forms, form, None) or getattr(feedback, form)
    for given in (WRONG[what], [WRONG[what]] * 3):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({field: given})
        assert caught.value.error_count() <= 16


def test_limits_of_the_settings_are_what_the_forms_have_room_for() -> None:
    adapter = TypeAdapter(Limits)
    fitting = settings().limits
    for name, most in (("messages", 4096), ("choices", 128)):
        given = {field: getattr(fitting, field) for field in Limits.__dataclass_fields__}
        assert getattr(adapter.validate_python(given | {name: most}), name) == most
        with pytest.raises(ValidationError):
            adapter.validate_python(given | {name: most + 1})


def test_what_reasonable_clients_send_fits() -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string", "enum": ["a", "b"]} for number in range(30)}}
    tools = [{"type": "function", "function": {"name": f"f{number}", "parameters": schema}} for number in range(128)]
    messages = [{"role": "user", "content": [{"type": "text", "text": "{[:," * 190}]} for _ in range(512)]
    body = {"model": "tiny", "messages": messages, "tools": tools, "stop": ["\n\nHuman:"] * 16}
    forms.ChatForm.model_validate(read_json(json.dumps(body, separators=(",", ":")).encode(), MIB))
    ids = {"model": "tiny", "prompt": list(range(131_000))}
    assert len(forms.CompletionForm.model_validate(read_json(json.dumps(ids).encode(), MIB)).prompt) == 131_000


# bodies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[" + "[]," * PARTS + "[]]", "objects, lists and fields"),
        ("[" + "{}," * PARTS + "{}]", "objects, lists and fields"),
        ("{" + '"":1,' * PARTS + '"":1}', "objects, lists and fields"),
        ("[" + "1," * (VALUES + 1) + "1]", "values"),
        ('["' + "[" * PARTS + '",' + "[]," * PARTS + "[]]", "objects, lists and fields"),
        ('["\\"",' + "[]," * PARTS + "[]]", "objects, lists and fields"),
        ('["\\\\",' + "[]," * PARTS + "[]]", "objects, lists and fields"),
        ('"",' * 200_000 + "[]," * PARTS, "values"),
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_read(body: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.serving.api.reading.json.loads", lambda _: pytest.fail("it was read"))
    with pytest.raises(HTTPException) as caught:
        read_json(body.encode(), MIB)
    assert caught.value.status_code == 400 and words in str(caught.value.detail)


@pytest.mark.parametrize("text", ["[{:," * 100_000, '"[{:,' * 25_000, "\\[{:," * 80_000, '\\"[' * 30_000])
def test_what_stands_in_texts_does_not_count(text: str) -> None:
    assert read_json(json.dumps({"a": text}).encode(), MIB) == {"a": text}


def test_there_is_more_room_in_a_larger_body() -> None:
    body = b"[" + b"[]," * (2 * PARTS - 2) + b"[]]"
    assert len(read_json(body, 2 * MIB)) == 2 * PARTS - 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_other_encodings_hide_nothing(encoding: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        read_json(('["∢",' + "[]," * 10 + "[]]").encode(encoding), MIB)


@pytest.mark.parametrize(("body", "code"), [(b"{", "invalid_json"), (b"\xff", "invalid_json"), (b"[" * 9000, None), (b"9" * 5000, None)])
def test_bodies_that_are_no_json_are_refused(body: bytes, code: str | None) -> None:
    with served(ScriptedEngine(lambda _: "yes")) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"role": "user", "content": [1.5] * 9}], "messages.0.content"),
        ([{"role": "user", "content": "a"}] * 2 + [{"role": "user", "content": [{"text": "a"}]}], "messages.2.content"),
        ([{"role": "user", "content": "a"}, {"role": "nobody"}], "messages.1.role"),
    ],
)
def test_the_mistake_is_still_named(messages: list[Any], named: str) -> None:
    with served(ScriptedEngine(lambda _: "yes")) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(named), answer.text


# addresses and headers


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models?" + "a=1&" * 3000, {}, 414),
        ("/health?" + "a=1&" * 3000, {}, 414),
        ("/v1/models/" + "a" * 9000, {}, 414),
        ("/v1/models", {"x-long": "a" * 66_000}, 431),
        ("/health", {"x-long": "a" * 66_000}, 431),
        ("/v1/models", {f"x-{number}": "a" for number in range(300)}, 431),
        ("/v1/models", {"host": "["}, 421),
        ("/v1/models", {"content-length": "9" * 5000}, 413),
    ],
)  # fmt: skip
def test_addresses_and_headers_have_a_longest_length_too(path: str, headers: dict[str, str], status: int) -> None:
    app = create_app(service(ScriptedEngine(lambda _: "yes"), None))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def scenario() -> None:
        where, _, query = path.partition("?")
        given = {"host": "localhost"} | headers
        scope = {
            "type": "http", "method": "GET", "path": where, "raw_path": where.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()], "scheme": "http", "http_version": "1.1",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "app": app,
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(scenario())
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["error"]["message"]


# what a reply is looked through for


def test_the_longest_stop_strings_hold_nothing_up() -> None:
    stops = Stops(["a" * 255 + str(number % 10) for number in range(16)])
    text = "a" * 20_000
    looked = 0

    class Counted(str):
        def startswith(self, *given: Any) -> bool:
            nonlocal looked
            looked += 1
            return str.startswith(self, *given)

    stops.words = tuple(Counted(word) for word in stops.words)
    assert stops.safe(text) == len(text) - 255
    assert looked <= 16 * 256
    with pytest.raises(ValidationError):
        forms.ChatForm.model_validate({"model": "a", "messages": [{"role": "user"}], "stop": "a" * 257})
