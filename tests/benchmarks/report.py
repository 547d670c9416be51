"""Tables in BENCHMARKS.md between markers, so that a benchmark run again replaces its own table and nothing else.

<!-- bench:step-time -->
…
<!-- /bench:step-time -->
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "BENCHMARKS.md"


def replaced(text: str, name: str, content: str) -> str:
    """The text with a section's content; a section that is not there yet comes at the end.

    Raises:
        ValueError: its markers are there more than once, or only one of them.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{begin}\n{content.strip()}\n{end}"
    counts = text.count(begin), text.count(end)
    if counts == (0, 0):
        return f"{text.rstrip()}\n\n{block}\n"
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"bench:{name}: its markers stand {counts[0]} and {counts[1]} times, or the wrong way round; once each is right")
    head, rest = text.split(begin)
    return head + block + rest.split(end)[1]


def write(name: str, content: str) -> None:
    """Replace a section of BENCHMARKS.md."""
    BENCHMARKS.write_text(replaced(BENCHMARKS.read_text(encoding="utf-8"), name, content), encoding="utf-8")


def machine() -> str:
    """This machine in a line: processor, cores, memory, accelerators."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {_processor()}, {memory:.0f} GiB, {_accelerators()}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", text)]
    return (name[1].strip() if name else "an unknown processor") + (f" ({', '.join(flags)})" if flags else "")


def _accelerators() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown; numbers with three digits."""
    named = list(titles)
    lines = [named, ["---"] * len(named), *rows]
    return "\n".join("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)
