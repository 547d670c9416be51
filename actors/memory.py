"""What glibc keeps of memory that was freed, and how to get it back. Free of torch. Other C libraries have no such calls, and nothing
happens there."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of these parameters in glibc's malloc.h."""
MIB = 1 << 20
ARENAS = 2
KEPT = 128 * MIB
"""Freed memory at the end of an arena that is kept for the next tensors. Given back, each of its pages is filled with zeros again when it
is asked for: 100,000 to 200,000 times in an update of a model of 2.0M, a seventh of its time."""
MAPPED = 32 * MIB
"""Blocks from here on (glibc allows no more) are given back at once."""


def tune_allocator() -> None:
    """Have threads share the allocator's arenas (a rank has thirty threads, and each arena keeps what they gave back), and let them keep
    enough for the next pass."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, KEPT)):
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Let the C library return what was freed. It keeps blocks of up to 32 MB for itself once it has seen some, and tensors of many sizes
    one after another then leave holes in which a whole model was measured to pile up."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
