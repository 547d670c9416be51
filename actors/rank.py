"""What a rank is told about itself. Without torch, so that a process can know which rank it is before it pays for torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class RankSpec:
    """Which rank this is."""

    role: str
    rank: int
    world_size: int
    threads: int


def off_device(method: F) -> F:
    """Mark a role's method that touches nothing on the device: roles that work in turns answer it without being woken."""
    method.off_device = True  # type: ignore[attr-defined]
    return method


def is_off_device(method: Callable[..., Any]) -> bool:
    return getattr(method, "off_device", False)
