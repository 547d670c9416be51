"""Whether a device computes in bf16. What emulates it is slower than in float32: nine times, in a product of 1024 x 192 and 192 x 512 on a
CPU with AVX2 alone."""

from __future__ import annotations

import functools
from pathlib import Path

FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of processors whose instructions include products in bf16: x86-64 and Arm."""


def computes_in_bf16(device: str) -> bool:
    """For the type of a torch device: every GPU that runs are placed on, and CPUs that have the instructions."""
    return device != "cpu" or cpu_has_bf16()


@functools.cache
def cpu_has_bf16(file: Path = Path("/proc/cpuinfo")) -> bool:
    """By the processor's flags; False where they cannot be read."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return not FLAGS.isdisjoint(flags)
