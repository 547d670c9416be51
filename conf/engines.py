"""What samples replies: the settings of `rollout`, one class for each engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from conf.settings import Count, Positive, Settings


@dataclass(frozen=True)
class TransformersRollout(Settings):
    """transformers with a key-value cache: no further package. `engine.rollout_batch` says how many replies at once."""

    engine: Literal["transformers"]
    """Chosen by `rollout=transformers`."""


@dataclass(frozen=True)
class VLLMRollout(Settings):
    """vLLM: a paged key-value cache, and a new reply begins as soon as another ends."""

    engine: Literal["vllm"]
    """Chosen by `rollout=vllm`."""
    gpu_memory: Annotated[float, Gt(0), Le(1)]
    """Share of each GPU's memory that an engine takes for weights and key-value cache; other roles on the device need the rest."""
    cpu_cache_gib: Positive
    """Key-value cache of an engine without a GPU, GiB; replies that find no room in it wait."""
    sequences: Count
    """Replies that one engine samples at once, at most; more use the device better and need more cache."""
    eager: bool | None
    """Run the model as it is, instead of captured as CUDA graphs (GPU) or compiled (CPU): starts sooner and samples more slowly; null:
    eager without a GPU."""
