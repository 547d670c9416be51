"""What can be said of `ppo.rewards` before anything starts: contradictions, files, functions and tokens that are not there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf.rewards import FunctionReward, HttpReward, ModelReward, RewardSource
from conf.schema import Config
from orchestration.errors import RequestError

RESERVED = ("std",)
"""Names whose `score_<name>` is another figure."""
HOW = ("folder", "batch", "timeout", "tries", "backoff", "token_env")
"""Settings of a source that say how it is reached, not what it gives: they may change between an interruption and going on."""


def with_absolute_paths(source: RewardSource, base: Path) -> RewardSource:
    """Paths resolved against `base`; a function is looked for there unless it names a folder."""
    if isinstance(source, FunctionReward):
        return dataclasses.replace(source, folder=str((base / (source.folder or ".")).resolve()))
    if isinstance(source, ModelReward) and source.path and (base / source.path).exists():  # a hub name stays as it is
        return dataclasses.replace(source, path=str((base / source.path).resolve()))
    return source


def identity(plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources' settings that decide what they give."""
    return [{key: value for key, value in source.items() if key not in HOW} for source in plain]


def contradictions(config: Config) -> Iterable[str]:
    """What is wrong with the sources, from the settings and the files alone."""
    names = [source.name for source in config.ppo.rewards]
    for number, source in enumerate(config.ppo.rewards):
        setting = f"ppo.rewards[{number}]"
        if source.name in names[:number]:
            yield f"{setting}.name={source.name}: another source has that name already; give each its own, for its figure score_<name>"
        if source.name in RESERVED:
            yield f"{setting}.name={source.name}: score_{source.name} is another figure; choose another name"
        if isinstance(source, ModelReward):
            yield from _model(source, setting)
        if isinstance(source, HttpReward):
            yield from _http(source, setting, config)
    if config.ppo.rewards and all(source.weight == 0 for source in config.ppo.rewards):
        yield "ppo.rewards: every weight is 0, so that there is nothing to learn from; give one source a weight"
    if config.reward_checkpoint and not config.ppo.uses_reward_model():
        yield (
            f"reward_checkpoint={config.reward_checkpoint}: no source of ppo.rewards uses it; add {{kind: model}} to them, or leave it out"
        )


def _model(source: ModelReward, setting: str) -> Iterable[str]:
    if source.path and source.path.startswith(("/", "./", "../")) and not (Path(source.path) / "config.json").exists():
        yield f"{setting}.path={source.path}: no Hugging Face checkpoint there (no config.json)"


def _http(source: HttpReward, setting: str, config: Config) -> Iterable[str]:
    try:
        address = urlsplit(source.url)
        host, _ = address.hostname, address.port
    except ValueError as cause:
        yield f"{setting}.url={source.url}: not a URL ({cause})"
        return
    if not host:
        yield f"{setting}.url={source.url}: names no host"
    if address.username or address.password:
        yield f"{setting}.url: holds a name or password, which would be written to files; use token_env for a bearer token"
    seconds = source.longest_seconds()
    if config.runtime == "ray" and seconds >= config.deadlines.step:
        yield (
            f"{setting}: {source.tries} tries of {source.timeout:g} s with their waits are up to {seconds:.0f} s, longer than "
            f"deadlines.step={config.deadlines.step:g}, which would end the run first; lower `tries` or `timeout`, or raise deadlines.step"
        )


def check(config: Config) -> None:
    """Import the functions and look for the tokens, as the ranks will.

    Raises:
        RequestError: with everything that is not there.
    """
    from actors.rewards.function import find  # torch, which a look at the settings need not wait for
    from actors.rewards.source import RewardError

    mistakes = []
    for source in config.ppo.rewards:
        if isinstance(source, FunctionReward):
            try:
                find(source)
            except RewardError as cause:
                mistakes.append(str(cause))
        if isinstance(source, HttpReward) and source.token_env and not os.environ.get(source.token_env):
            mistakes.append(f"ppo.rewards: {source.name}: token_env={source.token_env}: this environment variable is not set; export it")
    if mistakes:
        raise RequestError(mistakes)
