"""How vLLM is set up in every server that `serving_load.py` measures."""

from __future__ import annotations

from typing import Any

ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_num_seqs": 256, "enable_chunked_prefill": False, "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 2**30, "generation_config": "vllm",
}  # fmt: skip


def words(settings: dict[str, Any]) -> list[str]:
    """For vLLM's own command line."""
    found = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        found += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return found
