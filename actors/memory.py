"""What glibc keeps of memory that was freed, and how to get it back. Free of torch. Other C libraries have no such calls, and nothing
happens there."""

from __future__ import annotations

import contextlib
import ctypes

M_ARENA_MAX = -8
"""The number of this parameter in glibc's malloc.h."""


def share_arenas() -> None:
    """Have threads share two of the allocator's arenas: a rank has thirty threads, and each arena keeps what they gave back."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def give_back_freed_memory() -> None:
    """Let the C library return what was freed. It keeps blocks of up to 32 MB for itself once it has seen some, and tensors of many sizes
    one after another then leave holes in which a whole model was measured to pile up."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
