"""A run's figures on Ray's metrics port of each node, for Prometheus (`ray.util.metrics`; Ray puts `ray_` before every name).

The driver exports what belongs to the run as a whole, each rank the time of its own calls. Tags are few and small: the run's name, the
stage, the role, and a phase or the name of a call. Ray adds node and process by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

RUN = ("run", "stage")
GAUGES = {
    "step": ("chatray_step", "Steps done in this stage"),
    "steps": ("chatray_steps", "Steps of this stage at most"),
    "tokens_per_second": ("chatray_tokens_per_second", "Tokens of the last step, prompts included, over its seconds"),
    "loss": ("chatray_loss", "Training loss of the last step"),
    "heldout_loss": ("chatray_heldout_loss", "Loss on held-out rows, as last measured"),
    "score": ("chatray_score", "Mean score of the last step's replies"),
    "kl": ("chatray_kl_nats", "Mean KL to the reference over a reply, nats"),
    "beta": ("chatray_kl_beta", "Weight of the KL penalty"),
    "reply_tokens": ("chatray_reply_tokens", "Mean length of the replies, tokens"),
    "engine_gap_mean": ("chatray_engine_gap_nats", "Mean distance between the engines' and the trainer's log-probs, nats"),
    "weight_lag": ("chatray_weight_lag", "Updates by which the oldest weights that sampled this step were behind those that learned"),
    "queued_batches": ("chatray_queue_depth", "Batches asked of the rollout engines and not yet learned from"),
    "rollbacks": ("chatray_rollbacks", "Times that PPO went back to a commit because of its KL"),
    "restarts": ("chatray_restarts", "Times that this stage was begun again after it had been stopped or had failed"),
    "warnings": ("chatray_warnings", "Illnesses that the last step was warned of"),
}
"""Figures of a step that are exported as they are: figure -> name and description. Those that a stage does not have are left out."""
TOKENS = ("chatray_tokens_total", "Tokens worked on")
PHASES = ("chatray_phase_seconds", "How long phases of a step take, as the driver waits for them; the phase `step` is the whole")
WAITED = ("chatray_phase_waited_seconds_total", "Seconds of each phase in all")
"""Besides `PHASES`: the sum that Ray 2.60 exports with a histogram is of its buckets' bounds, not of what was observed."""
CALL_SECONDS = ("chatray_call_seconds_total", "Seconds that ranks of a role spent in a call")
CALLS = ("chatray_calls_total", "Calls that ranks of a role have done")
REPEAT_SECONDS = 1.0
"""Seconds between settings of the gauges."""
SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
"""Bounds of the buckets of phases."""


def run_name(run_dir: str) -> str:
    """The tag `run`: the name of the run's folder."""
    return Path(run_dir).name


class RunMetrics:
    """What the driver exports, of the stage that runs. Nothing happens before it is connected to Ray.

    Ray 2.60 forgets a gauge that was not set for two of its reporting intervals (20 s), and a step of a large model takes minutes: a thread
    sets the last values again and again.
    """

    def __init__(self, run_dir: str) -> None:
        self.run, self.stage = run_name(run_dir), ""
        self.made: dict[str, Any] = {}
        self.latest: dict[str, float] = {}
        """Gauge -> value, replaced as a whole: the thread reads it."""
        self.begun: dict[str, int] = {}
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def restarts(self, stage: str, times: int) -> None:
        """A stage begins that was begun so many times before."""
        self.begun[stage] = times

    def begin(self, stage: str, steps: int) -> None:
        """The figures that follow are this stage's."""
        self.stage = stage
        self.latest = {"step": 0.0, "steps": float(steps), "restarts": float(self.begun.get(stage, 0))}
        self._start()

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """A step's figures."""
        if not ray.is_initialized():
            return
        self._start()
        self.latest = self.latest | {name: float(value) for name, value in figures.items() if name in GAUGES} | {"step": float(step)}
        self._set()
        if figures.get("tokens", 0) > 0:
            self._made(Counter, *TOKENS, tag_keys=RUN).inc(figures["tokens"], self._tags())
        for phase, seconds in phases(figures).items():
            found = self._made(Histogram, *PHASES, boundaries=SECONDS, tag_keys=(*RUN, "phase"))
            found.observe(seconds, self._tags() | {"phase": phase})
            if seconds > 0:
                self._made(Counter, *WAITED, tag_keys=(*RUN, "phase")).inc(seconds, self._tags() | {"phase": phase})

    def close(self) -> None:
        """Export nothing more."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _start(self) -> None:
        if self.thread is None and ray.is_initialized():
            self.thread = threading.Thread(target=self._repeat, name="operator metrics", daemon=True)
            self.thread.start()

    def _repeat(self) -> None:
        while not self.ended.wait(REPEAT_SECONDS) and ray.is_initialized():
            self._set()

    def _set(self) -> None:
        tags = self._tags()
        for name, value in self.latest.items():
            self._made(Gauge, *GAUGES[name], tag_keys=RUN).set(value, tags)

    def _tags(self) -> dict[str, str]:
        return {"run": self.run, "stage": self.stage}

    def _made(self, kind: type, name: str, description: str, **more: Any) -> Any:
        if name not in self.made:
            self.made[name] = kind(name, description, **more)
        return self.made[name]


class CallMetrics:
    """What one rank exports: how often each of its role's methods was called, and the seconds spent in it."""

    def __init__(self, run_dir: str, role: str) -> None:
        tags = ("run", "role", "call")
        self.tags = {"run": run_name(run_dir), "role": role}
        self.seconds, self.calls = Counter(*CALL_SECONDS, tag_keys=tags), Counter(*CALLS, tag_keys=tags)

    def record(self, method: str, seconds: float) -> None:
        tags = self.tags | {"call": method}
        self.calls.inc(1, tags)
        if seconds > 0:
            self.seconds.inc(seconds, tags)


def phases(figures: Mapping[str, float]) -> dict[str, float]:
    """Phase -> seconds, of the figures `seconds_<phase>`, and the whole step's."""
    found = {name.removeprefix("seconds_"): value for name, value in figures.items() if name.startswith("seconds_")}
    return found | ({"step": figures["seconds"]} if "seconds" in figures else {})
