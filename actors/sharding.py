"""How a model lies on its ranks, and DeepSpeed's settings for it. Pure: the planner reads the same bucket sizes that the engine uses.

Buckets follow from the model: DeepSpeed's own defaults (5e8 elements to reduce at once, 1e9 parameters kept gathered) are larger than
most models of the ladder, which would then lie whole on every rank under ZeRO-3 in all but name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

BETAS = (0.9, 0.95)
PERSISTENT = 10_000
"""Parameters of at most so many elements (biases, norms) are kept whole under ZeRO-3 once they were gathered."""
SMALLEST_BUCKET = 1_000_000
"""Elements; smaller messages between ranks would be all latency."""
NVME_BUFFERS = 5
"""Parameters, each of up to the largest one's size, that are between their files and the device at once."""

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Optimizer:
    """AdamW and the gradient clip."""

    lr: float
    weight_decay: float
    max_grad_norm: float
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Sharding:
    """How one model is spread over its ranks, and where what it needs is kept."""

    stage: int = 0
    """ZeRO stage."""
    dtype: str = "fp32"
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    nvme_path: str | None = None
    """Folder for this engine's files alone: every engine writes files of the same names."""
    activation_checkpointing: bool = False
    micro_batch: int = 1


@dataclass(frozen=True)
class Buckets:
    """Elements that DeepSpeed moves or holds at once."""

    reduce: int
    """Gradients reduced together."""
    prefetch: int
    """Parameters gathered before they are needed (ZeRO-3)."""
    live: int
    """Parameters gathered at once, beyond which none is prefetched (ZeRO-3)."""
    optimizer: int
    """Parameters of one rank that are stepped together (ZeRO-3); the step computes with so many numbers in fp32 at once."""


def stage_in_force(stage: int, dtype: str, cuda: bool) -> int:
    """The ZeRO stage that an engine runs at: bf16 on CUDA needs 1 at least, since DeepSpeed's bf16 without ZeRO has gradient norms of its
    own."""
    return max(stage, 1) if dtype == "bf16" and cuda else stage


def buckets(parameters: Sequence[int], trained: Sequence[int], ranks: int) -> Buckets:
    """Bucket sizes for a model: the largest parameter sets the scale, since it is moved as one, and a rank's part of it stepped as one.

    Args:
        parameters: elements of each parameter.
        trained: elements of each parameter that is trained.
    """
    largest = max(parameters, default=1)
    step = max(largest, SMALLEST_BUCKET)
    ahead = max(largest // 8, SMALLEST_BUCKET)  # at least the next parameter is fetched, and the largest is often the embedding alone
    everything, learned = max(sum(parameters), 1), max(sum(trained), 1)
    together = max(-(-largest // ranks), SMALLEST_BUCKET)
    return Buckets(reduce=min(learned, step), prefetch=min(everything, ahead), live=min(everything, step + ahead), optimizer=together)


def settings(sharding: Sharding, optimizer: Optimizer | None, sizes: Buckets, bf16: bool, largest_share: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        bf16: whether DeepSpeed keeps bf16 weights beside fp32 masters.
        largest_share: elements of one rank's part of the largest parameter.
    """
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": sharding.micro_batch,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand: a step may hold any number of micro-batches
        "zero_optimization": _zero(sharding, optimizer is not None, sizes, largest_share),
        "bf16": {"enabled": bf16},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    if optimizer:
        params = {"lr": optimizer.lr, "betas": list(BETAS), "eps": optimizer.epsilon, "weight_decay": optimizer.weight_decay}
        found["optimizer"] = {"type": "AdamW", "params": params | {"torch_adam": True, "fused": True}}
        # without ZeRO, in fp32, the engine clips: DeepSpeed would keep no norm, and computing it twice takes time. (Its default is 1.0.)
        found["gradient_clipping"] = optimizer.max_grad_norm if sharding.stage > 0 or bf16 else 0.0
        found["zero_force_ds_cpu_optimizer"] = False
    return found


def _zero(sharding: Sharding, trains: bool, sizes: Buckets, largest_share: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": sharding.stage, "reduce_bucket_size": sizes.reduce}
    files = {"nvme_path": sharding.nvme_path} if sharding.nvme_path else {}
    if trains and sharding.stage > 0 and sharding.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": sharding.offload_optimizer, **files}
    if sharding.stage < 3:
        return zero
    zero |= {
        "stage3_prefetch_bucket_size": sizes.prefetch,
        "stage3_max_live_parameters": sizes.live,
        "stage3_max_reuse_distance": sizes.prefetch,  # what is needed again later than that is given back
        "stage3_param_persistence_threshold": PERSISTENT,
        "sub_group_size": sizes.optimizer,
    }
    if sharding.offload_parameters != "none":
        zero["offload_param"] = {"device": sharding.offload_parameters, **files}
        if sharding.offload_parameters == "nvme":
            zero["offload_param"] |= {"buffer_size": largest_share, "buffer_count": NVME_BUFFERS, "max_in_cpu": 0}
            # each gathered parameter occupies a buffer: what is fetched ahead or kept for later would use them up
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    return zero
