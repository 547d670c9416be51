"""What operators see of a run on Ray: its figures on the nodes' metrics ports, and traces of the steps and roles that were asked for."""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import ray
import tiny_ppo
from prometheus_client.parser import text_string_to_metric_families

from orchestration.metrics import Metrics
from orchestration.run_directory import read_records
from orchestration.runtime.cluster import RayRuntime
from orchestration.runtime.operator_metrics import GAUGES
from orchestration.stages import ppo

pytestmark = pytest.mark.ray

STEPS, TRACED = 3, 2
REPORT_MS = 2000
"""How often processes of Ray pass their figures on; it forgets a gauge after two times."""
SCRAPE_SECONDS = 60.0
TAGS = ("run", "stage", "role", "phase", "call")


class StaysUp(RayRuntime):
    """Its ranks live until the runtime is closed: what they export can be looked at after the stage."""

    ended = False

    def stop(self) -> None:
        if self.ended:
            super().stop()

    def close(self) -> None:
        self.ended = True
        super().close()


class Remembering(Metrics):
    """Also keeps what it was given."""

    given: list[dict[str, float]]

    def record(self, step: int, figures: dict[str, float]) -> None:
        self.given = [*getattr(self, "given", []), dict(figures)]
        super().record(step, figures)


class Finished(NamedTuple):
    run_dir: Path
    rows: list[dict[str, Any]]
    given: list[dict[str, float]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Three steps of PPO that sample one step ahead, the second of them traced, begun for the second time. The ranks are still there."""
    start = tiny_ppo.prepared(tmp_path_factory.mktemp("start"))
    words = ["runtime=ray", f"ppo.steps={STEPS}", "ppo.staleness=1", "ppo.importance_cap=2", "ppo.batch=8", "ppo.kl.budget=1000"]
    words += ["profile.roles=[policy,rollout]", f"profile.steps=[{TRACED}]", "profile.shapes=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", str(REPORT_MS))
        context = tiny_ppo.context(start, tmp_path_factory.mktemp("run"), *words)
        context = dataclasses.replace(context, metrics=Remembering(context.config))
        context.shared.connect = StaysUp
        context.metrics.restarts("ppo", 1)
        ppo.run(context)
        yield Finished(Path(context.config.run_dir), read_records(context.directory.metrics), context.metrics.given)
        context.metrics.close()
        context.shared.close()


Scraped = dict[tuple[str, ...], float]


def scrape() -> Scraped:
    """chatray's figures on the metrics ports of all nodes: name and own tags -> value, summed over processes."""
    found: Scraped = {}
    for node in ray.nodes():
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_chatray_") and "le" not in sample.labels:
                    key = (sample.name, *(sample.labels[tag] for tag in TAGS if tag in sample.labels))
                    found[key] = found.get(key, 0.0) + sample.value
    return found


def scraped(key: tuple[str, ...], value: float) -> Scraped:
    """What the ports show once this figure has this value, or at the end of `SCRAPE_SECONDS`."""
    deadline = time.monotonic() + SCRAPE_SECONDS
    while (found := scrape()).get(key) != pytest.approx(value) and time.monotonic() < deadline:
        time.sleep(0.2)  # there is nothing to wait on: Ray's processes report in their own time
    return found


def test_figures_of_the_run_stand_on_the_metrics_port(finished: Finished) -> None:
    run, last = finished.run_dir.name, finished.rows[-1]
    found = scraped(("ray_chatray_step", run, "ppo"), STEPS)
    gauges = {name: found.get((f"ray_{title}", run, "ppo")) for name, (title, _) in GAUGES.items()}
    assert gauges["restarts"] == 1
    assert gauges["steps"] == STEPS
    assert {name: gauges[name] for name in ("kl", "score", "beta", "tokens_per_second", "reply_tokens")} == pytest.approx(
        {name: last[name] for name in ("kl", "score", "beta", "tokens_per_second", "reply_tokens")}
    )
    assert gauges["weight_lag"] == 1
    assert gauges["queued_batches"] == finished.given[-1]["queued_batches"] == 0
    assert {name for name, value in gauges.items() if value is None} == {"loss", "heldout_loss"}
    assert found["ray_chatray_tokens_total", run, "ppo"] == sum(row["tokens"] for row in finished.rows)


def test_a_gauge_stays_when_no_step_ends_for_long(finished: Finished) -> None:
    key = ("ray_chatray_kl_nats", finished.run_dir.name, "ppo")
    seen = scraped(key, finished.rows[-1]["kl"])[key]
    deadline = time.monotonic() + 3 * REPORT_MS / 1000
    while time.monotonic() < deadline:
        time.sleep(0.5)
        assert scrape().get(key) == seen


def test_lag_and_queue_follow_what_was_asked_for_ahead(finished: Finished) -> None:
    assert [given["weight_lag"] for given in finished.given] == [0, 1, 1]
    assert [given["queued_batches"] for given in finished.given] == [1, 1, 0]


def test_phases_are_counted_and_add_up(finished: Finished) -> None:
    run = finished.run_dir.name
    found = scraped(("ray_chatray_phase_seconds_count", run, "ppo", "step"), STEPS)
    for phase in ("rollout", "reward", "scoring", "learning", "sync", "ahead"):
        assert found["ray_chatray_phase_seconds_count", run, "ppo", phase] == STEPS
        seconds = sum(row[f"seconds_{phase}"] for row in finished.rows)
        assert found["ray_chatray_phase_waited_seconds_total", run, "ppo", phase] == pytest.approx(seconds)


def test_every_rank_exports_its_own_calls(finished: Finished) -> None:
    run = finished.run_dir.name
    found = scraped(("ray_chatray_calls_total", run, "policy", "export"), 1)
    calls = {key[2:]: value for key, value in found.items() if key[0] == "ray_chatray_calls_total"}
    assert calls["policy", "update"] == calls["critic", "update"] == STEPS
    assert calls["rollout", "generate"] == calls["reward", "score"] == STEPS + 1
    assert {role for role, _ in calls} == {"policy", "critic", "reference", "reward", "rollout"}
    assert found["ray_chatray_call_seconds_total", run, "policy", "update"] > 0


def test_traces_of_the_asked_step_and_roles_alone(finished: Finished) -> None:
    files = sorted(path.relative_to(finished.run_dir / "profile").as_posix() for path in finished.run_dir.rglob("*.json.gz"))
    folder = f"ppo/step_{TRACED:06d}"
    assert files == [
        f"{folder}/policy_rank_0_call_01_experience.json.gz", f"{folder}/policy_rank_0_call_02_update.json.gz",
        f"{folder}/policy_rank_0_call_03_send_weights.json.gz", f"{folder}/rollout_rank_0_call_01_generate.json.gz",
    ]  # fmt: skip
    update = json.loads(gzip.decompress((finished.run_dir / "profile" / files[1]).read_bytes()))
    names = {event.get("name") for event in update["traceEvents"]}
    assert names & {"aten::addmm", "aten::mm", "aten::linear"}
    assert any("Backward" in str(name) for name in names)
    assert any("Input Dims" in event.get("args", {}) for event in update["traceEvents"])
