"""Weights on their way through an object store, in buckets: nobody holds a second copy of all of them.

A bucket is one flat array of bytes and its table of contents, stamped with a version and its place among the buckets of that version. What
is in which bucket follows from the model's shapes alone, so ranks need not agree on it. Faster ways, where ranks reach each other, are in
`routes.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""Bytes of one bucket at most; a larger weight is a bucket by itself."""
ALIGNED = 16
"""Each weight begins at a multiple of so many bytes, so that it can be read as its own type."""


@dataclass(frozen=True)
class WeightUpdate:
    """Some weights of one version. The array is numpy so that an object store shares it without a copy."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    flat: np.ndarray
    """Of bytes."""
    bucket: int = 0
    buckets: int = 1
    """How many make up the version; it counts when the last one is in."""

    def last(self) -> bool:
        return self.bucket == self.buckets - 1


def pack(weights: dict[str, Tensor], version: int, bucket: int = 0, buckets: int = 1) -> WeightUpdate:
    """Weights, each in its own type, in one array."""
    shapes, dtypes = tuple(tuple(t.shape) for t in weights.values()), tuple(t.dtype for t in weights.values())
    places, size = _places(shapes, dtypes)
    flat = torch.empty(size, dtype=torch.uint8)
    for tensor, (start, stop) in zip(weights.values(), places, strict=True):
        flat[start:stop].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    return WeightUpdate(version, tuple(weights), shapes, dtypes, flat.numpy(), bucket, buckets)


def unpack(update: WeightUpdate) -> dict[str, Tensor]:
    """The inverse of `pack`. The tensors are views of the array, which may be read-only: they are for reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no tensors that cannot be written to
        flat = torch.from_numpy(update.flat)
    places, _ = _places(update.shapes, update.dtypes)
    parts = zip(update.names, update.shapes, update.dtypes, places, strict=True)
    return {
        name: flat[start:stop].view(dtype).view(shape) if start < stop else torch.empty(shape, dtype=dtype)
        for name, shape, dtype, (start, stop) in parts
    }


def _places(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]) -> tuple[list[tuple[int, int]], int]:
    """(start, stop) of each weight's bytes, and how many there are in all."""
    places, at = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        stop = at + prod(shape) * dtype.itemsize
        places.append((at, stop))
        at = -(-stop // ALIGNED) * ALIGNED
    return places, at


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
