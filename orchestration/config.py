"""From YAML and overrides to a frozen, typed `Config`, or to one list of everything that is wrong with the request.

The only file that imports Hydra and OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
from conf.engines import TransformersRollout, VLLMRollout
from conf.schema import Config
from conf.sizes import Scale
from conf.sources import FilesData, Part, WorldData
from conf.sweeps import Sweep
from orchestration import reward_sources
from orchestration.contradictions import contradictions
from orchestration.errors import RequestError

FOLDER = Path(conf.__file__).resolve().parent
ALIASES = {"from": "rerun_from"}
SWEEPS = "sweep"
"""The group that is no part of a run's settings: `chatray sweep` alone reads it."""


def load(overrides: Sequence[str], working_directory: Path | None = None, reads_data: bool = True, consistent: bool = True) -> Config:
    """The configuration that the overrides ask for, checked.

    Args:
        overrides: in Hydra's grammar, e.g. `experiment=quickstart ppo.lr=1e-4`.
        working_directory: what relative paths start from; the current one by default.
        reads_data: whether files of `data` must be there.
        consistent: whether what the settings add up to is checked too.

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
        mistakes += list(contradictions(config, reads_data)) if consistent else []
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
        if key in ("data.kind", "labeler.kind", "rollout.engine"):
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
    folders = [folder for folder in sorted(FOLDER.iterdir()) if folder.name != SWEEPS and list(folder.glob("*.yaml"))]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def load_sweep(words: Sequence[str]) -> tuple[Sweep, list[str]]:
    """The sweep that `sweep=NAME sweep.setting=value …` asks for, and the other words, which are those of its runs.

    Raises:
        RequestError: with every mistake in the words of the sweep.
    """
    own = [word for word in words if word.partition("=")[0].lstrip("+~").split(".")[0] == SWEEPS]
    named = [word.partition("=")[2] for word in own if word.startswith(f"{SWEEPS}=")]
    choices = sorted(file.stem for file in (FOLDER / SWEEPS).glob("*.yaml"))
    name = named[-1] if named else "ppo"
    if name not in choices:
        raise RequestError(f"sweep={name}: no such sweep; choose from {', '.join(nearest(name, choices))}")
    parsed, mistakes = _parse([word for word in own if not word.startswith(f"{SWEEPS}=")])
    lines = [str(override.input_line) for override in parsed]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
            composed = compose(f"{SWEEPS}/{name}", overrides=[line if line[0] in "+~" else f"++{line}" for line in lines])
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        return TypeAdapter(Sweep).validate_json(json.dumps(plain[SWEEPS]), strict=True), [word for word in words if word not in own]
    except (HydraException, OmegaConfBaseException) as cause:
        mistakes.append(f"sweep={name}: it cannot be composed: {str(cause).splitlines()[0]}")
    except ValidationError as found:
        for error in found.errors():
            at = ".".join([SWEEPS, *(str(part) for part in error["loc"] if part not in ("fifo", "asha", "pbt"))])
            unknown = error["type"] in ("unexpected_keyword_argument", "extra_forbidden")
            near = nearest(at, list(leaves(Sweep, f"{SWEEPS}.")))[0]
            mistakes.append(f"{at}: no such setting; did you mean {near}?" if unknown else f"{at}={error['input']!r}: {error['msg']}")
    raise RequestError(mistakes)


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """A checked configuration with other values of some settings, by their dotted names.

    Raises:
        RequestError: with every mistake: no such setting, a value that is not one of it, or what they contradict.
    """
    plain, mistakes = as_dict(config), []
    for key, value in values.items():
        *sections, name = key.split(".")
        section: Any = plain
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            mistakes.append(f"{key}: no such setting; did you mean {nearest(key, list(leaves(Config)))[0]}?")
        else:
            section[name] = value
    changed = _typed(plain, mistakes)
    mistakes += list(contradictions(changed, False)) if changed is not None else []
    if mistakes or changed is None:
        raise RequestError(mistakes)
    return changed


def setting(config: Config, key: str) -> Any:
    """The value of a setting by its dotted name, as plain JSON.

    Raises:
        KeyError: there is none.
    """
    found: Any = as_dict(config)
    for part in key.split("."):
        if not isinstance(found, dict):
            raise KeyError(key)
        found = found[part]
    return found


def as_word(key: str, value: Any) -> str:
    """`key=value` as the command line takes it."""
    return f"{key}={_in_grammar(value)}"


def _in_grammar(value: Any) -> str:
    """A JSON value in Hydra's grammar for overrides."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_in_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_in_grammar(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)  # Hydra's: only before a quote
        return f"'{escaped}'"
    return "null" if value is None else json.dumps(value)


def rung(name: str) -> Scale:
    """A shape of the ladder as its file has it, without composing everything."""
    return TypeAdapter(Scale).validate_python(yaml.safe_load((FOLDER / "scale" / f"{name}.yaml").read_text(encoding="utf-8")))


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
        engine = VLLMRollout if (plain.get("rollout") or {}).get("engine") == "vllm" else TransformersRollout
        known = [name for name in leaves(Config) if not name.startswith(("data.", "rollout."))]
        known += [*leaves(source, "data."), *leaves(engine, "rollout.")]
        for error in found.errors():
            key = _key(error["loc"])
            key = next((alias for alias, name in ALIASES.items() if name == key), key)
            if error["type"] == "missing":
                mistakes.append(f"{key}: needed, but nothing gives it a value (was it deleted, or its group changed by hand?)")
            elif error["type"] in ("unexpected_keyword_argument", "extra_forbidden") and key in leaves(VLLMRollout, "rollout."):
                mistakes.append(f"{key}: a setting of vLLM, and replies are sampled by transformers; choose rollout=vllm")
            elif error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                mistakes.append(f"{key}: no such setting; did you mean {nearest(key, known)[0]}?")
            else:
                mistakes.append(f"{key}={error['input']!r}: {error['msg']}")
        return None


def _key(location: Sequence[str | int]) -> str:
    """The setting at fault. The tag of a union stands in its location but is no part of its name."""
    tagged = {n for n, part in enumerate(location) if part in ("world", "files") or (location[:2] == ("ppo", "rewards") and n == 3)}
    tagged |= {1} if location[0] == "rollout" else set()
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
    reward_model = dataclasses.replace(config.reward_model, path=if_local(config.reward_model.path))
    ppo = dataclasses.replace(config.ppo, rewards=tuple(reward_sources.with_absolute_paths(s, base) for s in config.ppo.rewards))
    engine = dataclasses.replace(
        config.engine, nvme_path=resolved(config.engine.nvme_path), stage_folder=resolved(config.engine.stage_folder)
    )
    return dataclasses.replace(
        config, run_dir=str((base / config.run_dir).resolve()), data=data, model=model, ppo=ppo, engine=engine,
        reward_model=reward_model,
        policy_checkpoint=if_local(config.policy_checkpoint), reward_checkpoint=if_local(config.reward_checkpoint),
    )  # fmt: skip


def as_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)
