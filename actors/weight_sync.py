"""Weights on their way from the policy to the rollout engines, in buckets: nobody holds a second copy of all of them.

A bucket is one flat array and its table of contents, stamped with a version and its place among the buckets of that version. What is in
which bucket follows from the model's shapes alone, so ranks need not agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""Bytes of one bucket at most; a larger weight is a bucket by itself."""


@dataclass(frozen=True)
class WeightUpdate:
    """Some weights of one version. The array is numpy so that an object store shares it without a copy."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: np.ndarray
    bucket: int = 0
    buckets: int = 1
    """How many make up the version; it counts when the last one is in."""

    def last(self) -> bool:
        return self.bucket == self.buckets - 1


def pack(weights: dict[str, Tensor], version: int, bucket: int = 0, buckets: int = 1) -> WeightUpdate:
    """Weights as float32 in one array."""
    flat = torch.cat([tensor.float().reshape(-1) for tensor in weights.values()])
    return WeightUpdate(version, tuple(weights), tuple(tuple(t.shape) for t in weights.values()), flat.numpy(), bucket, buckets)


def unpack(update: WeightUpdate) -> dict[str, Tensor]:
    """The inverse of `pack`; the tensors are views of one fresh copy."""
    flat = torch.from_numpy(update.flat.copy())
    parts = flat.split([prod(shape) for shape in update.shapes])
    return {name: part.view(shape) for name, shape, part in zip(update.names, update.shapes, parts, strict=True)}


class Arrivals:
    """Which buckets of a version have come to one engine."""

    def __init__(self) -> None:
        self.next, self.version = 0, -1

    def check(self, update: WeightUpdate) -> None:
        """Note that this bucket came.

        Raises:
            ValueError: it is not the next one: weights of two versions would be mixed.
        """
        expected = (self.version, self.next) if self.next else (update.version, 0)
        if (update.version, update.bucket) != expected:
            raise ValueError(
                f"bucket {update.bucket} of weights of version {update.version} came where bucket {expected[1]} of version {expected[0]} "
                "was expected"
            )
        self.version, self.next = update.version, 0 if update.last() else update.bucket + 1
