"""Files of tensors that are spread over ranks: one safetensors file for each rank that wrote them, read by any number of ranks.

A tensor is flattened, and each rank writes a run of its elements. The header of each file holds a table: of every tensor its whole shape
and where the run begins. A reader opens all files, which maps them and reads their headers, and then takes the elements that it needs.

    <folder>/rank_00000_of_00002.safetensors    keys `<kind>/<name>`: `weight/lm.norm.weight`, `exp_avg/lm.norm.weight`
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
         torch.int32: "I32", torch.bool: "BOOL"}  # fmt: skip
"""safetensors' names of types."""
METADATA = "__metadata__"


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a flattened tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    length: int

    @property
    def whole(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


def share(name: str, shape: Iterable[int], rank: int, ranks: int) -> Run:
    """The run of a tensor that is this rank's when it is cut into equal runs, the last ones shorter or empty; ZeRO-3 cuts so as well."""
    shape = tuple(shape)
    size = -(-math.prod(shape) // ranks)
    start = min(rank * size, math.prod(shape))
    return Run(name, shape, start, min(size, math.prod(shape) - start))


def emptied(folder: Path) -> Path:
    """The folder, empty, on every rank; all must call."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class ShardWriter:
    """Writes this rank's file of a folder tensor by tensor, so that no second copy of the rank's share is held."""

    def __init__(self, folder: Path, planned: Iterable[tuple[str, Run, torch.dtype]], notes: dict[str, Any]) -> None:
        """Args:
        planned: (kind, run, type) of what will be written, in order.
        notes: anything that JSON can hold, for the reader; rank 0's count.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.path = folder / f"rank_{rank:05d}_of_{ranks:05d}.safetensors"
        self.left = list(planned)
        self.header = self._header({"ranks": ranks, "notes": notes})

    def _header(self, table: dict[str, Any]) -> bytes:
        entries: dict[str, Any] = {}
        runs: dict[str, Any] = {}
        place = 0
        for kind, run, dtype in self.left:
            size = run.length * dtype.itemsize
            entries[f"{kind}/{run.name}"] = {"dtype": NAMES[dtype], "shape": [run.length], "data_offsets": [place, place + size]}
            runs[run.name] = {"shape": run.shape, "start": run.start}
            place += size
        text = json.dumps({METADATA: {"table": json.dumps(table | {"runs": runs})}, **entries}).encode()
        return text + b" " * (-len(text) % 8)

    def __enter__(self) -> ShardWriter:
        self.file = open(self.path, "wb")  # closed by __exit__
        self.file.write(len(self.header).to_bytes(8, "little") + self.header)
        return self

    def write(self, values: Tensor) -> None:
        """The next of the planned runs, a flat tensor."""
        _, run, dtype = self.left.pop(0)
        if (values.numel(), values.dtype) != (run.length, dtype):
            raise ValueError(f"{run.name}: {values.numel()} elements of {values.dtype} were given, {run.length} of {dtype} were planned")
        if values.numel():
            values.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(self.file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        if kind is None and self.left:
            raise ValueError(f"{self.path}: {len(self.left)} planned runs were not written, {self.left[0][1].name} the first of them")


class ShardReader:
    """What all ranks wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        FileNotFoundError: the folder has no such files, or not those of all ranks that wrote it.
        """
        found = sorted(folder.glob("rank_*.safetensors"))
        if not found:
            raise FileNotFoundError(f"no shards in {folder}")
        self.folder = folder
        self.files = [safe_open(path, "pt") for path in found]
        tables = [json.loads(file.metadata()["table"]) for file in self.files]
        if any(table["ranks"] != len(found) for table in tables):
            raise FileNotFoundError(f"{folder} was written by {tables[0]['ranks']} ranks, but holds the files of {len(found)}")
        self.notes: dict[str, Any] = tables[0]["notes"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[tuple[int, int]]] = {}  # of each name: (first element, number of the file)
        self._keys = [set(file.keys()) for file in self.files]
        for number, table in enumerate(tables):
            for name, run in table["runs"].items():
                self.shapes[name] = tuple(run["shape"])
                self._runs.setdefault(name, []).append((run["start"], number))

    def has(self, kind: str, name: str) -> bool:
        """Whether there are such values of this name."""
        return any(f"{kind}/{name}" in self._keys[number] for _, number in self._runs.get(name, ()))

    def read(self, kind: str, run: Run) -> Tensor:
        """These elements, flat.

        Raises:
            ValueError: the files hold no such tensor, one of another shape, or not all of the elements.
        """
        if self.shapes.get(run.name) != run.shape:
            there = "is not there" if run.name not in self.shapes else f"has shape {list(self.shapes[run.name])} there"
            raise ValueError(f"{self.folder}: {run.name} {there}, and shape {list(run.shape)} in this model: another model wrote it")
        pieces = list(self._pieces(kind, run))
        if sum(len(piece) for piece in pieces) != run.length:
            raise ValueError(f"{self.folder}: elements of {kind} of {run.name} are missing; the files are damaged")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _pieces(self, kind: str, run: Run) -> Iterator[Tensor]:
        key = f"{kind}/{run.name}"
        for start, number in sorted(self._runs[run.name]):
            if key not in self._keys[number]:
                continue
            part = self.files[number].get_slice(key)
            (length,) = part.get_shape()
            first, last = max(run.start, start) - start, min(run.start + run.length, start + length) - start
            if first < last:
                yield part[first:last]
