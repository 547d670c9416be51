"""The device that this process computes on: what it was given, never what the machine has.

Ray (2.60) hides a machine's GPUs from no process that reserved none, and whatever asks CUDA then finds them: so what was given is said
here, and everything that computes asks here. Imports torch when it is asked, not before.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""Environment of a process without a GPU. It counts from before CUDA is first asked."""

_gpus: float | None = None


def hide_gpus() -> None:
    """From now on this process, and what it starts, sees no GPU: for processes that are all ours. One that starts a Ray cluster must not,
    since the cluster would have none either."""
    os.environ.update(HIDDEN)


def give(gpus: float) -> None:
    """Say how many GPUs, or what part of one, this process was given; the last word counts."""
    global _gpus
    _gpus = gpus


def own_device() -> torch.device:
    """CUDA's current device, or the CPU: where no GPU was given, where GPUs are hidden, even if CUDA was asked before that and remembers
    some, and where torch sees none. A process that was told nothing takes what it sees."""
    import torch

    none = _gpus == 0 or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return torch.device("cpu" if none or not torch.cuda.is_available() else "cuda")
