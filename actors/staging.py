"""Checkpoints on a node's own disk: read from shared storage once per node, however many of its ranks load them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path


def staged(path: str, folder: str | None) -> str:
    """Where this node's ranks read a checkpoint: its copy below `folder`. Who comes first makes it, and the others wait for it; a
    checkpoint that has changed since is copied again, and its older copy goes.

    Args:
        path: a Hugging Face folder. A name on the hub is given back as it is: the hub's cache is on the node already.
        folder: on a disk of the node; None: nothing is copied.

    Raises:
        OSError: the copy cannot be written.
    """
    source = Path(path)
    if folder is None or not source.is_dir():
        return path
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    target = Path(folder) / f"{place}-{_contents(source)}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system when this process ends, however it does
        if not target.is_dir():
            for older in Path(folder).glob(f"{place}-*"):
                shutil.rmtree(older)
            half = target.with_suffix(".half")
            shutil.copytree(source, half, copy_function=shutil.copyfile)
            os.rename(half, target)
    return str(target)


def _contents(source: Path) -> str:
    """Changes when a file does: names, sizes, times of writing."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    seen = [(str(file.relative_to(source)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
