"""What `chatray serve` was asked to serve: from its words to models, settings and Serve's options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from actors.devices import HIDDEN
from conf.schema import Config
from conf.serving import Replicas, Serving
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.run_directory import ROUND, digest, sealed
from orchestration.serving.keys import is_loopback, read_keys
from orchestration.serving.prompts import read_prompts

OWN = ("run", "checkpoint", "stage")
IMPORT_PATH = "orchestration.serving.deployments:build"
CONNECTIONS = 10_000
"""Requests that reach an ingress replica at once, at most: more than HAProxy lets in (4096)."""
TOOL_FORMATS = ("taskmaster",)
"""Formats of rows whose dialogues have tool calls."""


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint to serve."""

    name: str
    checkpoint: str
    version: str
    """Changes with the files."""
    tools: bool


@dataclass(frozen=True)
class Launch:
    """Everything that is needed to start."""

    config: Config
    models: tuple[ModelSpec, ...]
    words: tuple[str, ...]
    """The request with absolute paths: it means the same on any machine that sees these."""

    @property
    def settings(self) -> Serving:
        return self.config.serving


def launch(words: Sequence[str], base: Path | None = None) -> Launch:
    """Args:
        words: `run=` or `checkpoint=`, `stage=`, and any setting.
        base: what relative paths start from; the current folder by default.

    Raises:
        RequestError: with everything that is wrong.
    """
    base = base or Path.cwd()
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
    rest = [word for word in words if word.partition("=")[0] not in OWN]
    config = configuration.load(rest, base, reads_data=False, consistent=False)
    settings = _absolute(config.serving, base)
    mistakes = [*_refused(settings)]
    models: tuple[ModelSpec, ...] = ()
    try:
        models = _models(own, settings, base)
    except RequestError as error:
        mistakes += error.mistakes
    for read in (lambda: read_keys(settings.keys, settings.limits), lambda: read_prompts(settings.prompts, settings.canary_words)):
        try:
            read()
        except RequestError as error:
            mistakes += error.mistakes
    if mistakes:
        raise RequestError(mistakes)
    home = {key: str((base / value).resolve()) for key, value in own.items() if key != "stage"}
    fixed = {"serving.keys": settings.keys, "serving.prompts": settings.prompts, "serving.store": f"'{settings.store}'"}
    named = [f"{key}={value}" for key, value in (own | home).items()]
    named += [word for word in rest if word.partition("=")[0] not in fixed]
    named += [f"{key}={value}" for key, value in fixed.items() if value is not None]
    return Launch(dataclasses.replace(config, serving=settings), models, tuple(named))


def _absolute(settings: Serving, base: Path) -> Serving:
    def resolved(path: str | None) -> str | None:
        return str((base / path).resolve()) if path else None

    url = settings.store
    if "://" not in url or url.startswith("sqlite:///"):
        url = f"sqlite:///{(base / url.removeprefix('sqlite:///')).resolve()}"
    return dataclasses.replace(settings, keys=resolved(settings.keys), prompts=resolved(settings.prompts), store=url)


def _refused(settings: Serving) -> list[str]:
    found = []
    if settings.keys is None and not is_loopback(settings.host):
        found.append(
            f"serving.host={settings.host}: reachable from other machines, and there are no API keys; make some with "
            "chatray key name=NAME file=keys.yaml and give serving.keys=keys.yaml"
        )
    for name in ("ingress", "engines", "moderators"):
        replicas: Replicas = getattr(settings, name)
        if replicas.most < replicas.least:
            found.append(f"serving.{name}.most={replicas.most}: below serving.{name}.least={replicas.least}")
    if settings.ingress.most > 1 and settings.store.startswith("sqlite"):
        found.append(f"serving.ingress.most={settings.ingress.most}: several ingresses share a store; give serving.store=postgresql://…")
    if settings.page and settings.ingress.most > 1:
        found.append(f"serving.ingress.most={settings.ingress.most}: the chat page needs one ingress; give serving.page=false")
    if "*" in settings.cors:
        found.append("serving.cors=*: name the origins that may call the API")
    return found


def _models(own: dict[str, str], settings: Serving, base: Path) -> tuple[ModelSpec, ...]:
    if bool(own.get("run")) == bool(own.get("checkpoint")):
        raise RequestError("run= or checkpoint=: one of them is needed, the run or the folder of the model to serve")
    if own.get("checkpoint"):
        folder = (base / own["checkpoint"]).resolve()
        if not (folder / "config.json").is_file():
            raise RequestError(f"checkpoint={own['checkpoint']}: no Hugging Face checkpoint (config.json) in {folder}")
        return (_spec(settings.model or folder.name, folder, settings, None),)
    run = (base / own["run"]).resolve()
    stages = own["stage"].split(",") if own.get("stage") else [next((s for s in ("ppo", "sft") if _has(run, s)), "ppo")]
    if wrong := [stage for stage in stages if stage not in ("sft", "ppo", "pretrain")]:
        raise RequestError(f"stage={own['stage']}: {wrong[0]!r} makes no language model; choose sft or ppo, or several with commas")
    if missing := [stage for stage in stages if not _has(run, stage)]:
        raise RequestError(f"run={own['run']}: no finished language model of the stage {missing[0]} in {run}; run it first, or give stage=")
    name = settings.model or run.name
    return tuple(
        _spec(name if number == 0 else f"{name}-{stage}", run / ROUND / stage / "checkpoint", settings, run)
        for number, stage in enumerate(stages)
    )


def _has(run: Path, stage: str) -> bool:
    folder = run / ROUND / stage / "checkpoint"
    return sealed(folder) is not None and (folder / "config.json").is_file()


def _spec(name: str, folder: Path, settings: Serving, run: Path | None) -> ModelSpec:
    facts = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()]
    tools = settings.tools == "taskmaster" or (settings.tools == "auto" and run is not None and _learned_tools(run))
    return ModelSpec(name, str(folder), digest(facts), tools)


def _learned_tools(run: Path) -> bool:
    """Whether the run's data have tool calls."""
    try:
        data = (yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}).get("data") or {}
    except (OSError, yaml.YAMLError, AttributeError):
        return False
    return any(part.get("format") in TOOL_FORMATS for part in data.get("mix") or [])


def replica_options(replicas: Replicas) -> dict[str, Any]:
    """How many there are and what each reserves, in Serve's words."""
    process: dict[str, Any] = {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}
    if not replicas.gpus:  # Ray would show it all GPUs of its machine
        process["runtime_env"] = {"env_vars": dict(HIDDEN)}
    found: dict[str, Any] = {"ray_actor_options": process}
    if replicas.most > replicas.least:
        scaling = {"min_replicas": replicas.least, "max_replicas": replicas.most, "target_ongoing_requests": replicas.target}
        return found | {"autoscaling_config": scaling}
    return found | {"num_replicas": replicas.least}


def options(wanted: Launch) -> dict[str, dict[str, Any]]:
    """Serve's options of each deployment, by its name."""
    settings = wanted.settings
    limits = settings.limits
    common = {"graceful_shutdown_timeout_s": settings.drain_seconds, "graceful_shutdown_wait_loop_s": 0.2, "health_check_period_s": 5.0}
    inner = common | {"logging_config": {"enable_access_log": False}}  # else a line for each call: several for each request
    engines = {
        engine_name(number): inner | replica_options(settings.engines)
        | {"max_ongoing_requests": settings.engine.sequences + limits.waiting, "max_queued_requests": limits.waiting}
        for number in range(len(wanted.models))
    }  # fmt: skip
    # more than the app takes at once: what is too much is answered by the app, in OpenAI's form, not by Serve in plain text
    ingress = common | replica_options(settings.ingress) | {"max_ongoing_requests": CONNECTIONS, "max_queued_requests": -1}
    found = {"Ingress": ingress, **engines}
    if settings.moderation.kind != "off":
        moderation = {"max_ongoing_requests": 16, "max_queued_requests": limits.ongoing}
        found["Moderation"] = inner | replica_options(settings.moderators) | moderation
    return found


def engine_name(number: int) -> str:
    return "Engine" if number == 0 else f"Engine-{number + 1}"


def as_yaml(wanted: Launch) -> str:
    """The file for `serve deploy`."""
    app = {
        "name": "chatray", "route_prefix": "/", "import_path": IMPORT_PATH, "args": {"words": list(wanted.words)},
        "deployments": [{"name": name, **given} for name, given in options(wanted).items()],
    }  # fmt: skip
    http = {"host": wanted.settings.host, "port": wanted.settings.port}
    return yaml.safe_dump({"proxy_location": "EveryNode", "http_options": http, "applications": [app]}, sort_keys=False)
