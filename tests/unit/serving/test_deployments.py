"""The deployments without a cluster: replicas in this process, by Serve's local testing mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from actors.serving.protocol import Drawing
from orchestration.serving import deployments
from orchestration.serving.building import as_plain
from orchestration.serving.deployments import Engine, Ingress, Moderation, RemoteEngine
from orchestration.serving.engine import Mailbox
from orchestration.serving.errors import ApiError, overloaded
from orchestration.serving.launch import Launch, launch, options
from orchestration.serving.service import Service
from orchestration.serving.wire import Desk
from tests.serving_stand_ins import listening, tiny_checkpoint, write_yaml

ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "where is the cat?"}], "max_tokens": 12, "temperature": 0}


def wanted(folder: Path, *words: str) -> Launch:
    return launch(["checkpoint=tiny", "serving.engine.interval_ms=0", "serving.prompts=prompts.yaml", *words], folder)


def user_config(found: Launch) -> dict[str, Any]:
    return {"serving": asdict(found.settings), "models": as_plain(found.models)}


def local(kind: type, name: str, config: dict[str, Any], *arguments: Any) -> Any:
    """A replica in this process. Serve does not wait there for `reconfigure`, so it is called here."""
    handle: Any = serve.run(deployments.deployed(kind, name=name).bind(*arguments), name=name, _local_testing_mode=True)
    handle.reconfigure.remote(config).result()
    return handle


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Ingress, Any, Path]]:
    folder = tmp_path_factory.mktemp("replicas")
    tiny_checkpoint(folder / "tiny", seed=0)
    write_yaml(folder / "prompts.yaml", {"*": {"version": 1, "before": "Be brief."}})
    found = wanted(folder)
    plain = asdict(found.settings)
    config = {"checkpoint": found.models[0].checkpoint, "version": found.models[0].version}
    engine = local(Engine, "Engine", config, deployments._of_engine(plain))
    moderation = local(Moderation, "Moderation", {"moderation": plain["moderation"], "revision": 0})
    ingress = Ingress({"tiny": engine}, moderation)
    ingress.app = deployments.bare_app()
    asyncio.run(ingress.reconfigure(user_config(found)))
    with listening(ingress.app) as url:
        yield url, ingress, engine, folder


def test_requests_pass_ingress_moderation_and_engine(replicas: tuple[str, Ingress, Any, Path]) -> None:
    url, ingress, _, _ = replicas
    whole = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=60).json()
    assert whole["usage"]["completion_tokens"] >= 1
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ASK | {"stream": True}, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(httpx.post(f"{url}/v1/moderations", json={"input": "hello"}, timeout=60).json()["results"]) == 1
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/metrics", timeout=60).status_code == 404
    ingress.check_health()


def test_another_prompt_and_limit_are_taken_over_by_a_running_ingress(replicas: tuple[str, Ingress, Any, Path]) -> None:
    url, ingress, _, folder = replicas
    service: Any = ingress.service
    before = service.models["tiny"]
    write_yaml(folder / "prompts.yaml", {"*": {"version": 2, "before": "Be long."}})
    asyncio.run(ingress.reconfigure(user_config(wanted(folder, "serving.limits.new_tokens=3", "serving.revision=1"))))
    assert ingress.service is service and isinstance(service, Service)
    assert (before.hidden.version, service.models["tiny"].hidden.version) == ("1", "2")
    answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=60)
    assert answer.status_code == 400
    asyncio.run(ingress.reconfigure(user_config(wanted(folder))))
    assert httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=60).status_code == 200


def test_an_engine_takes_over_another_checkpoint_or_keeps_its_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_checkpoint(tmp_path / str(seed), seed)
    found = launch([f"checkpoint={tmp_path / '0'}", "serving.moderation.kind='off'"], tmp_path)
    engine = Engine(deployments._of_engine(asdict(found.settings)))

    async def scenario() -> list[list[int]]:
        await engine.reconfigure({"checkpoint": str(tmp_path / "0"), "version": "a"})
        replies = [await reply()]
        await engine.reconfigure({"checkpoint": str(tmp_path / "nowhere"), "version": "b"})
        replies.append(await reply())
        await engine.reconfigure({"checkpoint": str(tmp_path / "1"), "version": "c"})
        replies.append(await reply())
        return replies

    async def reply() -> list[int]:
        wanted = deployments.Request("r", [20, 21, 22], Drawing(12, temperature=0.0), engine.tokenizer)
        desk = Desk("127.0.0.1")
        box = Mailbox(lambda: desk.forget("r"))
        desk.expect("r", box)
        await engine.generate(wanted, await desk.address())
        found: list[int] = []
        while not (box.ended and not box.deltas):
            found += delta.tokens if (delta := await box.take()) else []
        return found

    first, kept, second = asyncio.run(scenario())
    assert first == kept != second
    engine.check_health()
    engine.__del__()


def test_tokens_of_another_tokenizer_are_refused(replicas: tuple[str, Ingress, Any, Path]) -> None:
    _, _, handle, _ = replicas

    async def asked() -> None:
        await RemoteEngine(handle, Desk("127.0.0.1")).submit(deployments.Request("r", [20], Drawing(3), "another")).take()

    with pytest.raises(ApiError) as caught:
        asyncio.run(asked())
    assert caught.value.status == 503


def test_sums_and_levels_reach_ray_once_a_second_and_whole() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[float, dict[str, str]]] = []

        def inc(self, by: float, labels: dict[str, str]) -> None:
            self.seen.append((by, labels))

        def set(self, value: float) -> None:
            self.seen.append((value, {}))

    async def counted() -> tuple[Recorder, Recorder]:
        metrics = deployments.RayMetrics()
        counter, gauge = Recorder(), Recorder()
        metrics.counters["chatray_reply_tokens"] = counter
        metrics.gauges["chatray_ongoing"] = gauge
        for _ in range(3):
            metrics.count("chatray_reply_tokens", 2, model="a")
            metrics.count("chatray_reply_tokens", 0.5, model="b")
            metrics.count("chatray_reply_tokens", 0, model="c")
        metrics.set("chatray_ongoing", 4)
        metrics.set("chatray_ongoing", 1)
        assert not counter.seen and metrics.due is not None
        metrics.due.cancel()
        metrics.publish()
        metrics.publish()
        return counter, gauge

    counter, gauge = asyncio.run(counted())
    assert counter.seen == [(6, {"model": "a"}), (1.5, {"model": "b"})]
    assert gauge.seen == [(1, {})]


def test_errors_survive_the_way_between_processes() -> None:
    import pickle

    found = pickle.loads(pickle.dumps(overloaded(3.0)))
    assert (found.status, found.code, found.headers()) == (503, "overloaded", {"Retry-After": "3"})


def test_what_restarts_engines_and_what_does_not(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny", 0)
    write_yaml(tmp_path / "prompts.yaml", {"*": {"before": "Be brief."}})
    plain = [
        deployments._of_engine(asdict(wanted(tmp_path, *words).settings))
        for words in (
            [], ["serving.revision=4"], ["serving.refusal=No."], ["serving.moderation.thresholds={hate: {block: 0.5}}"],
            ["serving.engine.sequences=3"],
        )
    ]  # fmt: skip
    assert plain[0] == plain[1] == plain[2] == plain[3] != plain[4]


def test_options_follow_the_settings(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny", 0)
    write_yaml(tmp_path / "prompts.yaml", {"*": {"before": "Be brief."}})
    found = options(wanted(tmp_path, "serving.engines.most=3", "serving.engines.gpus=1", "serving.drain_seconds=7"))
    assert found["Engine"]["autoscaling_config"]["max_replicas"] == 3
    assert found["Engine"]["ray_actor_options"]["num_gpus"] == 1
    assert {given["graceful_shutdown_timeout_s"] for given in found.values()} == {7}
    assert set(found) == {"Ingress", "Engine", "Moderation"}
    assert set(options(wanted(tmp_path, "serving.moderation.kind='off'"))) == {"Ingress", "Engine"}
