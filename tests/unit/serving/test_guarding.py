"""Keys, quotas, sizes, headers, and what clients are never told."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from orchestration import cli
from orchestration.errors import RequestError
from orchestration.serving.errors import ApiError
from orchestration.serving.keys import Owner, Quotas, hashed, is_loopback, make_key, read_keys
from orchestration.serving.launch import launch
from tests.serving_stand_ins import ScriptedEngine, served, settings, write_yaml

ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def keyed(path: Path, **limits: int) -> str:
    return write_yaml(path, [{"name": "alice", "sha256": hashed("secret-key-of-alice"), **limits}])


def test_a_key_is_needed_and_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "chatray.serving")
    keys = read_keys(keyed(tmp_path / "keys.yaml"), settings().limits)
    with served(ScriptedEngine(lambda prompt: "yes"), keys=keys, with_settings=settings(log_prompts=True)) as (url, service):
        good, bad = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("secret-key-of-alice", "wrong-key"))
        assert good.chat.completions.create(**ASK).choices[0].message.content == "yes"
        with pytest.raises(openai.AuthenticationError) as caught:
            bad.chat.completions.create(**ASK)
        assert caught.value.code == "invalid_api_key"
        unkeyed = [httpx.get(f"{url}{path}").status_code for path in ("/v1/models", "/metrics", "/v1/conversations", "/v1/nothing")]
        assert unkeyed == [401] * 4
        assert httpx.get(f"{url}/health").status_code == 200
        made = service.store.new_conversation("key-" + hashed("secret-key-of-alice")[:16])
    assert "secret-key" not in caplog.text and "wrong-key" not in caplog.text
    assert "secret-key" not in made.owner


def test_requests_per_minute_and_tokens_per_day(tmp_path: Path) -> None:
    keys = read_keys(keyed(tmp_path / "keys.yaml", requests_per_minute=3, tokens_per_day=60), settings().limits)
    headers = {"authorization": "Bearer secret-key-of-alice"}
    with served(ScriptedEngine(lambda prompt: "a" * 30), keys=keys) as (url, service):
        now = [1000.0]
        service.quotas.clock = lambda: now[0]
        statuses = []
        for _ in range(4):
            answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=headers)
            statuses.append((answer.status_code, answer.json().get("error", {}).get("code")))
            now[0] += 1
        assert statuses[:2] == [(200, None), (200, None)]
        assert statuses[2:] == [(429, "insufficient_quota")] * 2
        assert int(answer.headers["retry-after"]) > 80_000
        now[0] += 86_400
        assert httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=headers).status_code == 200


def test_a_rate_recovers_after_a_minute() -> None:
    now = [0.0]
    quotas, owner = Quotas(lambda: now[0]), Owner("a", "a", 2, 0)
    quotas.admit(owner)
    now[0] = 30.0
    quotas.admit(owner)
    with pytest.raises(ApiError) as caught:
        quotas.admit(owner)
    assert (caught.value.status, caught.value.retry_after) == (429, 30.0)
    now[0] = 60.5
    quotas.admit(owner)


def test_keys_are_made_printed_once_and_stored_hashed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "keys.yaml"
    first = make_key(path, "alice")
    assert cli.main(["key", "name=bob", f"file={path}"]) == 0
    second = capsys.readouterr().out.split()[1]
    assert cli.main(["key", "name=bob", f"file={path}"]) == 2
    keys = read_keys(str(path), settings().limits)
    assert [keys.owner(f"Bearer {key}").name for key in (first, second)] == ["alice", "bob"]
    assert first not in path.read_text() and second not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first) > 40 and first != second


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[{name: a}]", "[{name: a, sha256: secret}]", "[{name: a, sha256: a, requests_per_minute: x}]", "[a", "[{key: a}]"],
)
def test_a_wrong_file_of_keys_is_refused_without_quoting_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(RequestError) as caught:
        read_keys(str(path), settings().limits)
    assert "serving.keys=" in str(caught.value) and "secret" not in str(caught.value)


def test_bodies_that_are_too_large() -> None:
    with served(ScriptedEngine(lambda prompt: "yes"), with_settings=settings(body_bytes=2000)) as (url, _):
        long = ASK | {"user": "x" * 5000}
        declared = httpx.post(f"{url}/v1/chat/completions", json=long)

        def chunks() -> Any:
            yield b'{"model": "tiny", "user": "'
            for _ in range(100):
                yield b"x" * 100
            yield b'"}'

        chunked = httpx.post(f"{url}/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"})
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert declared.json()["error"]["code"] == "request_too_large"
    assert "error" in chunked.json()


def test_too_many_messages_and_characters() -> None:
    with served(ScriptedEngine(lambda prompt: "yes"), with_settings=settings(messages=3, characters=50)) as (url, _):
        many = httpx.post(f"{url}/v1/chat/completions", json=ASK | {"messages": ASK["messages"] * 4})
        long = httpx.post(f"{url}/v1/chat/completions", json=ASK | {"messages": [{"role": "user", "content": "x" * 51}]})
    assert [many.status_code, long.status_code] == [400, 400]


def test_security_headers_and_no_cross_origin_by_default() -> None:
    preflight = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    with served(ScriptedEngine(lambda prompt: "yes")) as (url, _):
        answers = [httpx.get(f"{url}/v1/models"), httpx.get(f"{url}/nothing"), httpx.post(f"{url}/v1/chat/completions", content="{")]
        closed = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in closed.headers
    with served(ScriptedEngine(lambda prompt: "yes"), with_settings=settings(cors=("https://elsewhere.example",))) as (url, _):
        opened = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
        other = httpx.options(f"{url}/v1/chat/completions", headers=preflight | {"origin": "https://third.example"})
    assert opened.headers["access-control-allow-origin"] == "https://elsewhere.example"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("elsewhere.example", 421), ("127.0.0.1.elsewhere.example:8000", 421)],
)
def test_without_keys_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    """A page elsewhere can let its own name point to 127.0.0.1, and would then be of the same origin."""
    with served(ScriptedEngine(lambda prompt: "yes")) as (url, _):
        answers = [httpx.get(f"{url}{path}", headers={"host": host}) for path in ("/v1/models", "/health")]
    assert [answer.status_code for answer in answers] == [status, status]


def test_with_keys_any_name_is_answered(tmp_path: Path) -> None:
    key = {"authorization": "Bearer secret-key-of-alice", "host": "chat.example"}
    with served(ScriptedEngine(lambda prompt: "yes"), keys=read_keys(keyed(tmp_path / "keys.yaml"), settings().limits)) as (url, _):
        assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200


def test_what_breaks_inside_stays_inside() -> None:
    engine = ScriptedEngine(lambda prompt: "yes")
    engine.error = RuntimeError("the password is swordfish")
    with served(engine) as (url, _):
        whole = httpx.post(f"{url}/v1/chat/completions", json=ASK)
        stream = httpx.post(f"{url}/v1/chat/completions", json=ASK | {"stream": True})
    for answer in (whole, stream):
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "swordfish" not in answer.text and "Traceback" not in answer.text


def test_prompts_are_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatray.serving")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "my medical history"}]}
    for wanted in (False, True):
        with served(ScriptedEngine(lambda prompt: "yes"), with_settings=settings(log_prompts=wanted)) as (url, _):
            httpx.post(f"{url}/v1/chat/completions", json=asked)
        assert ("my medical history" in caplog.text) is wanted


def test_metrics_count_tokens_and_times() -> None:
    with served(ScriptedEngine(lambda prompt: "yes"), moderated=True) as (url, _):
        httpx.post(f"{url}/v1/chat/completions", json=ASK)
        httpx.post(f"{url}/v1/chat/completions", json=ASK | {"messages": [{"role": "user", "content": "kill"}]})
        text = httpx.get(f"{url}/metrics").text
    assert 'chatray_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
    assert 'chatray_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'chatray_moderation_hits_total{action="block",side="input"} 1.0' in text
    assert "chatray_ongoing 0.0" in text


def test_which_addresses_are_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))


def checkpoint(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return f"checkpoint={folder}"


OFF = "serving.moderation.kind='off'"


def test_another_host_without_keys_is_refused(tmp_path: Path) -> None:
    word = checkpoint(tmp_path / "model")
    with pytest.raises(RequestError, match=r"serving\.host=0\.0\.0\.0: .*chatray key"):
        launch([word, "serving.host=0.0.0.0", OFF], tmp_path)
    keys = keyed(tmp_path / "keys.yaml")
    assert launch([word, "serving.host=0.0.0.0", "serving.keys=keys.yaml", OFF], tmp_path).settings.keys == keys


def test_every_mistake_of_a_launch_is_reported_at_once(tmp_path: Path) -> None:
    words = ["run=nowhere", "serving.engines.least=3", "serving.cors=['*']", "serving.keys=none.yaml", "serving.prompts=none.yaml", OFF]
    with pytest.raises(RequestError) as caught:
        launch(words, tmp_path)
    told = "\n".join(caught.value.mistakes)
    assert all(part in told for part in ("run=nowhere", "serving.engines.most=1", "serving.cors=*", "serving.keys=", "serving.prompts="))
    assert len(caught.value.mistakes) == 5


def test_a_launch_needs_one_model(tmp_path: Path) -> None:
    for words in ([], ["run=a", "checkpoint=b"]):
        with pytest.raises(RequestError, match="run= or checkpoint="):
            launch([*words, OFF], tmp_path)
    with pytest.raises(RequestError, match="no Hugging Face checkpoint"):
        launch(["checkpoint=here", OFF], tmp_path)


def test_the_words_of_a_launch_mean_the_same_elsewhere(tmp_path: Path) -> None:
    write_yaml(tmp_path / "prompts.yaml", {"*": {"before": "Be kind."}})
    keyed(tmp_path / "keys.yaml")
    checkpoint(tmp_path / "model")
    words = ["checkpoint=model", "serving.prompts=prompts.yaml", "serving.keys=keys.yaml", "serving.store=sqlite:///a.db", OFF]
    here = launch(words, tmp_path)
    elsewhere = launch(here.words, Path("/"))
    assert elsewhere.settings == here.settings
    assert elsewhere.models == here.models
    assert here.models[0].name == "model"


def test_the_yaml_for_serve_deploy_is_one_that_serve_takes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from ray.serve.schema import ServeDeploySchema

    word = checkpoint(tmp_path / "model")
    assert cli.main(["serve", word, OFF, "serving.engines.most=4", "serving.port=8123", "--yaml"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    parsed = ServeDeploySchema.model_validate(content)
    app = parsed.applications[0]
    assert (parsed.http_options.port, app.import_path) == (8123, "orchestration.serving.deployments:build")
    by_name = {deployment.name: deployment for deployment in app.deployments}
    assert by_name["Engine"].autoscaling_config["max_replicas"] == 4  # type: ignore[index]
    assert set(content["applications"][0]["deployments"][0]) <= set(type(app.deployments[0]).model_fields)
