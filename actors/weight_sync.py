"""Weights on their way from the policy to the rollout engines: one flat array and its table of contents, stamped with a version."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightUpdate:
    """All weights of one version. The array is numpy so that an object store shares it without a copy."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: np.ndarray


def pack(weights: dict[str, Tensor], version: int) -> WeightUpdate:
    """Weights as float32 in one array."""
    flat = torch.cat([tensor.float().reshape(-1) for tensor in weights.values()])
    return WeightUpdate(version, tuple(weights), tuple(tuple(t.shape) for t in weights.values()), flat.numpy())


def unpack(update: WeightUpdate) -> dict[str, Tensor]:
    """The inverse of `pack`; the tensors are views of one fresh copy."""
    flat = torch.from_numpy(update.flat.copy())
    parts = flat.split([prod(shape) for shape in update.shapes])
    return {name: part.view(shape) for name, shape, part in zip(update.names, update.shapes, parts, strict=True)}
