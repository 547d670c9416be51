"""Where PPO's scores come from: the settings of `ppo.rewards`, in the style of schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AllowInfNan, StringConstraints

from conf.settings import Count, Positive, Settings

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Number = Annotated[float, AllowInfNan(False)]
LONGEST_WAIT = 60.0
"""Seconds between two tries of a service at most."""


@dataclass(frozen=True)
class ModelReward(Settings):
    """A reward model, with the policy's tokenizer or with one of its own."""

    kind: Literal["model"]
    """Which kind of source this is."""
    name: Name = "model"
    """What its figure `score_<name>` is called."""
    weight: Number = 1.0
    """Factor of its scores in the sum over all sources; negative turns it round, 0 only logs it."""
    path: str | None = None
    """A folder that the stage `reward_model` wrote, or a Hugging Face sequence classifier with one label (a folder or a hub name); null
    takes this run's own reward model, or `reward_checkpoint`."""


@dataclass(frozen=True)
class FunctionReward(Settings):
    """A Python function: `function(conversations, replies) -> list of float`."""

    kind: Literal["function"]
    """Which kind of source this is."""
    function: Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$")]
    """Its import path, `package.module:name`."""
    name: Name = "function"
    """What its figure `score_<name>` is called."""
    weight: Number = 1.0
    """Factor of its scores in the sum over all sources; negative turns it round, 0 only logs it."""
    folder: str | None = None
    """Where the module is found, on every machine that runs reward ranks; null: the folder that chatray was started in. It is looked in
    last, after everything that is installed."""


@dataclass(frozen=True)
class HttpReward(Settings):
    """A service that answers `{"conversations": …, "replies": …}` with `{"rewards": [numbers]}`."""

    kind: Literal["http"]
    """Which kind of source this is."""
    url: Annotated[str, StringConstraints(pattern=r"^https?://")]
    """Where requests are posted."""
    name: Name = "http"
    """What its figure `score_<name>` is called."""
    weight: Number = 1.0
    """Factor of its scores in the sum over all sources; negative turns it round, 0 only logs it."""
    batch: Count = 64
    """Replies per request at most."""
    timeout: Positive = 20.0
    """Seconds without a byte from the service after which a try has failed."""
    tries: Count = 5
    """Times a request is sent before the run ends, when the connection fails or the service is overloaded (429) or in error (5xx)."""
    backoff: Positive = 0.5
    """Seconds before the second try; doubled before each further one, and spread by a random half either way."""
    token_env: str | None = None
    """Environment variable with a bearer token for the service, read where chatray is started; the token itself is written nowhere."""

    def longest_seconds(self) -> float:
        """How long a service that stays down can hold up one request, where it does not ask for longer waits itself."""
        waits = sum(min(self.backoff * 2**n, LONGEST_WAIT) * 1.5 for n in range(self.tries - 1))
        return self.tries * self.timeout + waits


RewardSource = ModelReward | FunctionReward | HttpReward
