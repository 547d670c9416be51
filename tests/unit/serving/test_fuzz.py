"""The service's own OpenAPI description, fuzzed: nothing that a client sends may break it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from orchestration.serving.app import create_app
from orchestration.serving.store.store import Store
from tests.serving_stand_ins import ScriptedEngine, service

EXAMPLES = 25
ENDPOINTS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/moderations", "GET /v1/models", "GET /v1/models/{model}",
    "POST /v1/conversations", "GET /v1/conversations", "GET /v1/conversations/{id}", "POST /v1/conversations/{id}",
    "DELETE /v1/conversations/{id}", "POST /v1/feedback", "GET /v1/feedback", "DELETE /v1/feedback/{id}", "DELETE /v1/data", "GET /health",
    "GET /metrics",
)  # fmt: skip
HERE = {"host": "localhost"}
"""Without keys no other name is answered."""


@pytest.fixture(scope="module")
def operations() -> Iterator[dict[str, Any]]:
    """Each endpoint of the description by its method and path."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        app = create_app(service(ScriptedEngine(lambda _: "yes"), store, moderated=True))
        found = [result.ok() for result in schemathesis.openapi.from_asgi("/openapi.json", app, headers=HERE).get_all_operations()]
        yield {f"{operation.method.upper()} {operation.path}": operation for operation in found}
        store.close()


def test_every_endpoint_is_fuzzed(operations: dict[str, Any]) -> None:
    assert set(operations) == set(ENDPOINTS)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_request_breaks_the_service(operations: dict[str, Any], endpoint: str) -> None:
    statuses: list[int] = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operations[endpoint].as_strategy())
    def sent(case: Any) -> None:
        answer = case.call(headers=HERE)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400 and case.path.startswith("/v1"):
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    sent()
    assert statuses
