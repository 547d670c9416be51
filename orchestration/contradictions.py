"""What is wrong with a configuration that no single setting shows: values that do not go together, and files that are not there.

Each finding says the value, its cause, and the setting to change.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path

from conf.schema import PPO_ROLES, Config
from conf.sources import FilesData, Part, WorldData
from orchestration import reward_sources

SUFFIXES = {
    "rows": (".jsonl", ".ndjson", ".json"),
    "taskmaster": (".json", ".jsonl"),
    "text": (".txt", ".jsonl", ".ndjson", ".json"),
    "dataset": (".parquet", ".arrow", ".jsonl", ".ndjson", ".json"),
}
"""Names of the files that are read from a folder, by format; each may end in .gz besides."""


def contradictions(config: Config, reads_data: bool = True) -> Iterable[str]:
    """What no single setting shows: values that do not go together, and files that are not there."""
    yield from _shapes(config)
    yield from _ranks(config)
    yield from _local(config)
    yield from _files(config, reads_data)
    yield from _pretraining(config)
    yield from _adapters(config)
    yield from _offloading(config)
    yield from _features(config)
    yield from _reward_size(config)
    yield from _ppo(config)
    yield from _choices(config)
    yield from _guard(config)
    yield from _profile(config)
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
        elif config.engine.longest is not None and length >= config.engine.longest:
            yield f"{stage}.max_new_tokens={length}: leaves no room for a prompt in engine.longest={config.engine.longest}"


def _runs(config: Config, stage: str) -> bool:
    """Whether a stage is among those asked for."""
    asked = config.stage in ("all", stage)
    return asked and not (stage == "pretrain" and not config.pretrain.steps)


def divisors(config: Config) -> dict[str, int]:
    """Setting -> what its value must be a multiple of, for the stages that run: whole rows on every rank in every step."""
    place, ppo = config.placement, config.ppo
    found: dict[str, int] = {}
    if _runs(config, "ppo"):
        learning = [getattr(place, role).ranks for role in (("policy", "critic") if ppo.has_critic() else ("policy",))]
        samples = ppo.samples_per_prompt * (place.policy.ranks if ppo.compares_replies() else 1)
        ranks = [getattr(place, role).ranks for role in config.roles_of_ppo()]
        found["ppo.batch"] = math.lcm(*ranks, *(ppo.minibatches * count for count in learning), samples)
        if ppo.ptx > 0:
            found["ppo.ptx_batch"] = place.policy.ranks
    return found | {f"{stage}.batch": place.train.ranks for stage in ("pretrain", "sft", "reward_model") if _runs(config, stage)}


def multiple_from(value: int, divisor: int) -> int:
    """The least multiple that is no less than the value."""
    return -(-value // divisor) * divisor


def _ranks(config: Config) -> Iterable[str]:
    place, ppo = config.placement, config.ppo
    needed = divisors(config)
    if "ppo.batch" in needed:
        works = f"; the next that works is ppo.batch={multiple_from(ppo.batch, needed['ppo.batch'])}"
        yield from (f"{mistake}{works}" for mistake in _batch_of_ppo(config))
    if ppo.ptx_batch % needed.get("ppo.ptx_batch", 1):
        works = f"; the next that works is ppo.ptx_batch={multiple_from(ppo.ptx_batch, place.policy.ranks)}"
        yield f"ppo.ptx_batch={ppo.ptx_batch}: not divisible by placement.policy.ranks={place.policy.ranks}{works}"
    for stage in ("pretrain", "sft", "reward_model"):
        batch = getattr(config, stage).batch
        if batch % needed.get(f"{stage}.batch", 1):
            works = f"; the next that works is {stage}.batch={multiple_from(batch, place.train.ranks)}"
            yield f"{stage}.batch={batch}: not divisible by placement.train.ranks={place.train.ranks}{works}"
    for role in ("train", *PPO_ROLES):
        if role != "rollout" and getattr(place, role).tensor_parallel > 1:
            parts = getattr(place, role).tensor_parallel
            yield f"placement.{role}.tensor_parallel={parts}: rollout engines alone are split over devices; set it to 1"


def _local(config: Config) -> Iterable[str]:
    """What one process for all roles cannot be."""
    if config.runtime != "local":
        return
    places = {role: getattr(config.placement, role) for role in ("train", *PPO_ROLES)}
    yield from (
        f"placement.{role}.ranks={place.ranks}: runtime=local runs one rank per role; use placement=cpu, or runtime=ray"
        for role, place in places.items()
        if place.ranks > 1
    )
    on = [role for role, place in places.items() if place.gpus]
    off = [role for role in places if role not in on]
    if on and off:
        yield (
            f"placement.{off[0]}.gpus=0: beside placement.{on[0]}.gpus={places[on[0]].gpus:g}, and runtime=local is one process for all "
            "roles, which computes on a GPU or does not; give every role some, or none, or use runtime=ray"
        )


def _batch_of_ppo(config: Config) -> Iterable[str]:
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


def _ppo(config: Config) -> Iterable[str]:
    ppo, ranks = config.ppo, config.placement.policy.ranks
    samples = ppo.samples_per_prompt
    if ppo.staleness and ppo.importance_cap is None:
        yield (
            f"ppo.staleness={ppo.staleness}: samples of older weights must be corrected for; set ppo.importance_cap (2 is usual), or "
            "ppo.staleness=0"
        )
    if ppo.staleness and config.placement.sleep:
        yield f"ppo.staleness={ppo.staleness}: roles that take turns (placement.sleep=true) cannot sample while others learn; set it to 0"
    if config.engine.compile and config.zero_stage() == 3:
        yield "engine.compile=true: under ZeRO stage 3 parameters come and go within a block; set it to false, or engine.zero_stage to 2"
    if ppo.waves > 1 and config.placement.sleep:
        yield f"ppo.waves={ppo.waves}: roles that take turns (placement.sleep=true) cannot score while others sample; set it to 1"
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


def _files(config: Config, reads_data: bool) -> Iterable[str]:
    if reads_data and isinstance(config.data, FilesData):
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
    if wanted["offload_parameters"] != "none" and config.placement.sleep and _runs(config, "ppo"):
        yield (
            f"engine.offload_parameters={wanted['offload_parameters']}: DeepSpeed moves nothing of a model whose parameters are offloaded, "
            "and roles that take turns (placement.sleep=true) must leave their device; set engine.offload_parameters=none (asleep, "
            "parameters rest in host memory anyhow), or placement.sleep=false"
        )


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


def _reward_size(config: Config) -> Iterable[str]:
    """A reward model of another size than the policy."""
    start, path, scale = config.reward_model.start, config.reward_model.path, config.reward_scale
    if start == "own" and path is None and scale is None:
        yield "reward_model.start=own: of which size? Set reward_model.path, or a shape with scale@reward_scale=<scale>"
    if start != "own":
        for setting, value in (("reward_model.path", path), ("reward_scale", scale and scale.name)):
            if value is not None:
                yield f"{setting}={value}: it counts with reward_model.start=own only, and that is {start}"
    if start == "own" and path is None and config.lora.trains("reward_model"):
        yield "lora.roles: stage reward_model starts from random weights, which adapters leave as they are; set reward_model.path"
    if path and path.startswith(("/", ".")) and not (Path(path) / "config.json").exists():
        yield f"reward_model.path={path}: no Hugging Face checkpoint there (no config.json)"


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


def _profile(config: Config) -> Iterable[str]:
    """Traces that would never be written."""
    profile = config.profile
    if bool(profile.roles) != bool(profile.steps):
        given, other = ("roles", "steps") if profile.roles else ("steps", "roles")
        yield f"profile.{given}={list(getattr(profile, given))}: without profile.{other} nothing is traced; set both, or neither"
    for role in profile.roles:
        if role != "train" and role not in config.roles_of_ppo():
            yield f"profile.roles: {role} has no ranks of its own in this run; choose from train, {', '.join(config.roles_of_ppo())}"
        stages = [stage for stage in (("pretrain", "sft", "reward_model") if role == "train" else ("ppo",)) if _runs(config, stage)]
        longest = max((getattr(config, stage).steps for stage in stages), default=0)
        if profile.steps and min(profile.steps) > longest:
            what = f"the {longest} steps of {' and '.join(stages)}" if stages else f"stage={config.stage}, which {role} has no part in"
            yield f"profile.steps={list(profile.steps)}: none is within {what}; choose another step or role"
