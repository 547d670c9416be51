"""From YAML and overrides to a frozen, typed `Config`, or to one list of everything that is wrong with the request.

The only file that imports Hydra and OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

import conf
from conf.schema import PPO_ROLES, Config
from conf.sources import FilesData, Part, WorldData
from orchestration import reward_sources
from orchestration.errors import RequestError

FOLDER = Path(conf.__file__).resolve().parent
ALIASES = {"from": "rerun_from"}
SUFFIXES = {
    "rows": (".jsonl", ".ndjson", ".json"),
    "taskmaster": (".json", ".jsonl"),
    "text": (".txt", ".jsonl", ".ndjson", ".json"),
    "dataset": (".parquet", ".arrow", ".jsonl", ".ndjson", ".json"),
}
"""Names of the files that are read from a folder, by format; each may end in .gz besides."""


def load(overrides: Sequence[str], working_directory: Path | None = None) -> Config:
    """The configuration that the overrides ask for, checked.

    Args:
        overrides: in Hydra's grammar, e.g. `experiment=quickstart ppo.lr=1e-4`.
        working_directory: what relative paths start from; the current one by default.

    Raises:
        RequestError: with every mistake found in the overrides, the types and what they add up to.
    """
    parsed, mistakes = _parse(overrides)
    plain = _compose(parsed, mistakes)
    if plain is None:
        raise RequestError(mistakes)
    name = plain.get("experiment") or "run"
    plain["run_dir"] = plain.get("run_dir") or f"runs/{name}"
    config = _typed(plain, mistakes)
    if config is not None:
        config = with_absolute_paths(config, working_directory or Path.cwd())
        mistakes += list(contradictions(config))
    if mistakes or config is None:
        raise RequestError(mistakes)
    return config


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    parsed, mistakes = [], []
    for text in overrides:
        key, sign, value = text.partition("=")
        if key.split(".")[0].lstrip("+~") == "hydra":
            mistakes.append(f"{text}: Hydra's own settings have no place here; chatray composes and runs by itself")
            continue
        if key in ("data.kind", "labeler.kind"):
            mistakes.append(f"{text}: choose the group instead: {key.split('.')[0]}={value}")
            continue
        try:
            parsed += OverridesParser.create().parse_overrides([f"{ALIASES.get(key, key)}{sign}{value}"])
        except HydraException as cause:
            quoted = f"; quote a value with special characters: {key}=\"'{value}'\"" if sign else ""
            mistakes.append(f"{text}: not an override of the form key=value ({str(cause).splitlines()[0]}){quoted}")
    return parsed, mistakes


def groups() -> dict[str, list[str]]:
    """The choices of each Hydra group."""
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in sorted(FOLDER.iterdir()) if list(p.glob("*.yaml"))}


def _compose(parsed: list[Override], mistakes: list[str]) -> dict[str, Any] | None:
    choices = groups()
    accepted = []
    for override in parsed:
        line = str(override.input_line)
        if override.is_sweep_override():
            mistakes.append(f"{line}: one value is needed here, not a sweep")
        elif override.key_or_group in choices and not isinstance(override.value(), dict):
            if str(override.value()) in choices[override.key_or_group]:
                accepted.append(line)
            else:
                near = nearest(str(override.value()), choices[override.key_or_group])
                mistakes.append(f"{line}: no such {override.key_or_group}; choose from {', '.join(near)}")
        else:  # forced in, so that an unknown key is reported together with all other mistakes, by `_typed`
            accepted.append(line if line[0] in "+~" else f"++{line}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
            return OmegaConf.to_container(compose("config", overrides=accepted), resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as cause:
        mistakes.append(f"the configuration cannot be composed: {str(cause).splitlines()[0]}")
        return None


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """All names, the most similar first."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())


def _typed(plain: dict[str, Any], mistakes: list[str]) -> Config | None:
    try:
        # JSON mode: strict about types (no "3" for 3), yet a dict may become a dataclass
        return TypeAdapter(Config).validate_json(json.dumps(plain), strict=True)
    except ValidationError as found:
        source = {"world": WorldData, "files": FilesData}.get(str((plain.get("data") or {}).get("kind")), WorldData)
        known = [name for name in leaves(Config) if not name.startswith("data.")] + list(leaves(source, "data."))
        for error in found.errors():
            key = _key(error["loc"])
            key = next((alias for alias, name in ALIASES.items() if name == key), key)
            if error["type"] == "missing":
                mistakes.append(f"{key}: needed, but nothing gives it a value (was it deleted, or its group changed by hand?)")
            elif error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                mistakes.append(f"{key}: no such setting; did you mean {nearest(key, known)[0]}?")
            else:
                mistakes.append(f"{key}={error['input']!r}: {error['msg']}")
        return None


def _key(location: Sequence[str | int]) -> str:
    """The setting at fault. The tag of a union stands in its location but is no part of its name."""
    tagged = {n for n, part in enumerate(location) if part in ("world", "files") or (location[:2] == ("ppo", "rewards") and n == 3)}
    return ".".join(str(part) for n, part in enumerate(location) if n not in tagged)


def leaves(section: type, prefix: str = "") -> Iterable[str]:
    """Dotted names of every setting below a section."""
    hints = {f.name: f for f in dataclasses.fields(section)}
    for name in hints:
        kinds = _sections_of(section, name)
        if not kinds:
            yield prefix + name
        for kind in kinds:
            yield from leaves(kind, f"{prefix}{name}.")


def _sections_of(section: type, name: str) -> list[type]:
    from typing import get_args, get_origin, get_type_hints

    hint = get_type_hints(section)[name]
    if get_origin(hint) is tuple or type(None) in get_args(hint):  # a list, or a section that may be left out: set as a whole
        return []
    options = [hint, *get_args(hint)]
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def with_absolute_paths(config: Config, base: Path) -> Config:
    """Paths resolved against `base`, once, before anything changes directory."""

    def resolved(path: str | None) -> str | None:
        return str((base / path).resolve()) if path else path

    def if_local(name: str | None) -> str | None:  # a hub name stays as it is
        return resolved(name) if name and (base / name).exists() else name

    def located(part: Part, folder: str | None) -> Part:
        path = str(Path(folder or base, part.path).resolve()) if part.path else folder
        return dataclasses.replace(part, path=path, name=if_local(part.name))

    data = config.data
    if isinstance(data, FilesData):
        path = resolved(data.path)
        pretrain = located(data.pretrain, path) if data.pretrain else None
        data = dataclasses.replace(data, path=path, mix=tuple(located(part, path) for part in data.mix), pretrain=pretrain)
    model = dataclasses.replace(config.model, path=if_local(config.model.path), tokenizer=if_local(config.model.tokenizer))
    ppo = dataclasses.replace(config.ppo, rewards=tuple(reward_sources.with_absolute_paths(s, base) for s in config.ppo.rewards))
    engine = dataclasses.replace(config.engine, nvme_path=resolved(config.engine.nvme_path))
    return dataclasses.replace(
        config, run_dir=str((base / config.run_dir).resolve()), data=data, model=model, ppo=ppo, engine=engine,
        policy_checkpoint=if_local(config.policy_checkpoint), reward_checkpoint=if_local(config.reward_checkpoint),
    )  # fmt: skip


def contradictions(config: Config) -> Iterable[str]:
    """What no single setting shows: values that do not go together, and files that are not there."""
    yield from _shapes(config)
    yield from _ranks(config)
    yield from _files(config)
    yield from _pretraining(config)
    yield from _adapters(config)
    yield from _offloading(config)
    yield from _features(config)
    yield from _ppo(config)
    yield from _choices(config)
    yield from _guard(config)
    yield from reward_sources.contradictions(config)


def _shapes(config: Config) -> Iterable[str]:
    scale, compare = config.scale, config.compare
    if scale.width % scale.heads:
        yield f"scale.width={scale.width}: not a multiple of scale.heads={scale.heads}"
    if compare.k_min > compare.k_max:
        yield f"compare.k_min={compare.k_min}: above compare.k_max={compare.k_max}"
    for stage, length in (
        ("compare", compare.max_new_tokens),
        ("ppo", config.ppo.max_new_tokens),
        ("evaluate", config.evaluate.max_new_tokens),
    ):
        if config.model.path is None and length >= scale.context:
            yield f"{stage}.max_new_tokens={length}: leaves no room for a prompt in scale.context={scale.context}"


def _ranks(config: Config) -> Iterable[str]:
    place, ppo = config.placement, config.ppo
    roles = config.roles_of_ppo()
    together = math.lcm(*(getattr(place, role).ranks for role in roles))
    if ppo.batch % together:
        counts = ", ".join(f"{role} {getattr(place, role).ranks}" for role in roles)
        yield f"ppo.batch={ppo.batch}: not divisible by {together}, the least common multiple of the roles' ranks ({counts})"
    for role in ("policy", "critic") if ppo.has_critic() else ("policy",):
        ranks = getattr(place, role).ranks
        if ppo.batch % (ranks * ppo.minibatches):
            yield f"ppo.batch={ppo.batch}: not divisible by ppo.minibatches={ppo.minibatches} x placement.{role}.ranks={ranks}"
    if ppo.ptx > 0 and ppo.ptx_batch % place.policy.ranks:
        yield f"ppo.ptx_batch={ppo.ptx_batch}: not divisible by placement.policy.ranks={place.policy.ranks}"
    for stage in ("pretrain", "sft", "reward_model"):
        batch = getattr(config, stage).batch
        if batch % place.train.ranks:
            yield f"{stage}.batch={batch}: not divisible by placement.train.ranks={place.train.ranks}"
    if config.runtime == "local":
        for role in ("train", *PPO_ROLES):
            if getattr(place, role).ranks > 1:
                ranks = getattr(place, role).ranks
                yield f"placement.{role}.ranks={ranks}: runtime=local runs one rank per role; use placement=cpu, or runtime=ray"


def _ppo(config: Config) -> Iterable[str]:
    ppo, ranks = config.ppo, config.placement.policy.ranks
    samples = ppo.samples_per_prompt
    if ppo.compares_replies() and samples < 2:
        yield (
            f"ppo.samples_per_prompt={samples}: ppo.advantage={ppo.advantage} compares the replies to one prompt; set it to 2 or more, or "
            "use ppo.advantage=reinforce"
        )
    if ppo.batch % samples:
        yield f"ppo.batch={ppo.batch}: not divisible by ppo.samples_per_prompt={samples}"
    elif ppo.compares_replies() and ppo.batch % (samples * ranks):
        yield (
            f"ppo.batch={ppo.batch}: not divisible by ppo.samples_per_prompt={samples} x placement.policy.ranks={ranks}; "
            f"ppo.advantage={ppo.advantage} needs all replies to a prompt on one policy rank"
        )
    if ppo.dual_clip is not None and ppo.dual_clip <= 1 + ppo.clip:
        yield f"ppo.dual_clip={ppo.dual_clip:g}: not above 1 + ppo.clip={1 + ppo.clip:g}; it would cut ratios that the clip leaves alone"


def _files(config: Config) -> Iterable[str]:
    if isinstance(config.data, FilesData):
        yield from _parts(config.data)
    for name in ("policy_checkpoint", "reward_checkpoint"):
        path = getattr(config, name)
        if path and path.startswith(("/", "./", "../")) and not (Path(path) / "config.json").exists():
            yield f"{name}={path}: no Hugging Face checkpoint there (no config.json)"
    if config.model.path and config.model.path.startswith(("/", ".")) and not (Path(config.model.path) / "config.json").exists():
        yield f"model.path={config.model.path}: no Hugging Face checkpoint there (no config.json)"
    parent = Path(config.run_dir)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield f"run_dir={config.run_dir}: {parent} is not a folder that can be written to"


def _pretraining(config: Config) -> Iterable[str]:
    if isinstance(config.data, WorldData):
        has_text, source = config.data.texts > 0, "data.texts=0"
    else:
        has_text = config.data.pretrain is not None or any("text" in (part.format, part.columns) for part in config.data.mix)
        source = "data.pretrain=null"
    if config.pretrain.steps and not has_text:
        yield f"pretrain.steps={config.pretrain.steps}: there is no text to pretrain on ({source}); give some, or set pretrain.steps=0"
    if config.ppo.ptx > 0 and not has_text:
        yield (
            f"ppo.ptx={config.ppo.ptx:g}: it is a loss on pretraining text, and there is none ({source}); give some, or set ppo.ptx=0 "
            "(demonstrations do not stand in for it)"
        )
    for setting, value in (("stage", config.stage), ("from", config.rerun_from)):
        if value == "pretrain" and not config.pretrain.steps:
            yield f"{setting}=pretrain: pretrain.steps=0 leaves that stage out; set pretrain.steps above 0"


def _adapters(config: Config) -> Iterable[str]:
    """Adapters on random weights: those would stay random."""
    random = config.model.path is None
    why = "starts from random weights, which adapters leave as they are"
    if config.lora.trains("sft") and random and not config.pretrain.steps:
        yield f"lora.roles: stage sft {why}; set model.path or pretrain.steps, or leave sft out of lora.roles"
    if config.lora.trains("reward_model") and random and config.reward_model.start == "model":
        yield f"lora.roles: stage reward_model {why}; set model.path or reward_model.start=sft, or leave reward_model out of lora.roles"
    if config.lora.trains("reward_model") and config.reward_model.train == "head":
        yield "lora.roles: reward_model.train=head trains none of the layers that have adapters; leave reward_model out of lora.roles"
    if config.lora.rank and not config.lora.roles:
        yield f"lora.rank={config.lora.rank}: lora.roles=[] names no model to train by adapters; name some, or set lora.rank=0"


def _offloading(config: Config) -> Iterable[str]:
    """What can be moved off the device depends on the ZeRO stage that has cut it up."""
    stage, engine = config.zero_stage(), config.engine
    wanted = {"offload_optimizer": config.offload_optimizer(), "offload_parameters": config.offload_parameters()}
    needed = {"offload_optimizer": {"none": 0, "cpu": 1, "nvme": 3}, "offload_parameters": {"none": 0, "cpu": 3, "nvme": 3}}
    for name, place in wanted.items():
        if stage < needed[name][place]:
            yield (
                f"engine.{name}={place}: needs ZeRO stage {needed[name][place]} or higher, and the stage is {stage}; set "
                f"engine.zero_stage={needed[name][place]}, or engine.{name}=none"
            )
        if place == "nvme" and engine.nvme_path is None:
            yield f"engine.{name}=nvme: engine.nvme_path=null names no folder for its files; name one on a fast local disk of every node"
    if wanted["offload_parameters"] == "nvme" and wanted["offload_optimizer"] == "none":
        yield "engine.offload_parameters=nvme: optimizer states, which are larger, stay behind; set engine.offload_optimizer=nvme or cpu"


def _features(config: Config) -> Iterable[str]:
    given = config.reward_model.features
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        yield f"reward_model.features=[{','.join(given)}]: {', '.join(twice)} is there more than once; name each group once"


def _parts(data: FilesData) -> Iterable[str]:
    if not data.mix:
        yield "data.mix=[]: at least one part is needed, for example data.mix='[{format: messages}]'"
    for number, part in enumerate(data.mix):
        yield from _part(part, f"data.mix[{number}]", data.path)
    if data.pretrain is not None:
        yield from _part(data.pretrain, "data.pretrain", data.path)
        if "text" not in (data.pretrain.format, data.pretrain.columns):
            yield f"data.pretrain.format={data.pretrain.format}: plain text is needed; use format: text, or a dataset with columns: text"


def _part(part: Part, setting: str, shorthand: str | None) -> Iterable[str]:
    if part.format == "dataset":
        if not part.name or not part.columns:
            yield f"{setting}: format dataset needs a name and columns, for example {{format: dataset, name: squad, columns: messages}}"
        elif Path(part.name).exists() and not part_files(part)[""]:
            yield f"{setting}.name={part.name}: there is no {', '.join(f'*{suffix}' for suffix in SUFFIXES['dataset'])} in it"
        return
    if part.path is None:
        yield f"{'data.path' if shorthand is None else setting}: needed; the file or folder with rows of format {part.format} for {setting}"
        return
    named = "data.path" if part.path == shorthand else f"{setting}.path"
    for folder, files in part_files(part).items():
        if not files:
            below = f"{folder}/" if folder else ""
            wanted = " or ".join(f"{below}*{suffix}" for suffix in SUFFIXES.get(part.format, SUFFIXES["rows"]))
            yield f"{named}={part.path}: there is no {wanted} in it, plain or gzipped"


def part_files(part: Part) -> dict[str, list[Path]]:
    """The local files of a part in order, by the folder below its path; Taskmaster has two. A data set on the hub has none."""
    place = Path((part.name if part.format == "dataset" else part.path) or ".")
    suffixes = SUFFIXES.get(part.format, SUFFIXES["rows"])
    if place.is_file():
        return {"": [place]}
    folders = ("data", "reward") if part.format == "taskmaster" else ("",)
    return {folder: sorted(f for f in (place / folder).glob("*") if _suffix(f) in suffixes and f.is_file()) for folder in folders}


def _suffix(file: Path) -> str:
    """Without the .gz of a packed file."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _choices(config: Config) -> Iterable[str]:
    ranks = config.ppo.uses_reward_model() or config.stage in ("compare", "reward_model")
    if ranks:
        yield from _preferences(config)
    if ranks and config.labeler.kind == "simulated" and not isinstance(config.data, WorldData):
        yield "labeler=simulated: it can rank answers in the embedded world only; use labeler=recorded with this data"
    if ranks and config.labeler.kind == "recorded" and isinstance(config.data, WorldData):
        yield "labeler=recorded: the embedded world has no recorded judgements; use labeler=simulated"
    if config.labeler.kind == "simulated" and config.reward_model.start == "model":
        yield "reward_model.start=model: simulated labellers rank what the SFT model sampled; use reward_model.start=sft"
    if config.logging.wandb == "online" and not os.environ.get("WANDB_API_KEY") and not (Path.home() / ".netrc").exists():
        yield "logging.wandb=online: no WANDB_API_KEY in the environment; log in, or use logging.wandb=offline"
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "logging.tensorboard=true: the package tensorboard is not installed; pip install tensorboard"


def _guard(config: Config) -> Iterable[str]:
    if config.ppo.guard.action == "rollback" and config.ppo.kl.beta == 0:
        yield "ppo.guard.action=rollback: it raises beta, and ppo.kl.beta=0 stays 0 when multiplied; set ppo.kl.beta above 0"


def _preferences(config: Config) -> Iterable[str]:
    """Whether files hold what the asked stages learn preferences from, and one kind of it."""
    if not isinstance(config.data, FilesData) or config.stage not in ("all", "compare", "reward_model"):
        return
    held = {part.columns or part.format for part in config.data.mix}
    rankings, judgements = held & {"hh", "rankings"}, held & {"taskmaster"}
    if rankings and judgements:
        yield (
            f"data.mix: {', '.join(sorted(rankings))} hold comparisons and taskmaster holds judgements, and one reward model learns from "
            "one kind; leave out one of them"
        )
    if config.data.mix and not rankings | judgements:
        yield f"data.mix: {', '.join(sorted(held))} hold no comparisons or judgements for stage={config.stage}; add some, or use stage=sft"
    if (rankings or judgements) and config.data.heldout_preferences == 0:
        yield "data.heldout_preferences=0: the reward model is measured on held-out preferences; keep some"


def as_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)
