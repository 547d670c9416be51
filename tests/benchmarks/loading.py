"""Peak memory of loading and exporting a model that is partitioned over ranks (ZeRO-3): one rank's share, and little more.

    python -m tests.benchmarks.loading                  # the table of BENCHMARKS.md: 125m on 1, 2 and 4 ranks
    python -m tests.benchmarks.loading --scale 350m --ranks 2

Each rank is a fresh process. Its peak is the most anonymous memory (RssAnon of /proc/self/status, every 5 ms) above what it held when its
libraries were imported and its process group was up; files that are mapped are not counted, as the system may drop them at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from actors.engine import Engine
from actors.models import LanguageModel, load_causal_lm, undrawn_causal_lm, write_model, write_unfilled
from actors.sharding import Sharding
from actors.worker import start_process_group
from conf.sizes import Scale
from orchestration import config as configuration

MB = 10**6
INTERVAL = 0.005
ALLOWANCE_MB = 40
"""What a rank may hold besides its share and one shard: torch's threads, gloo's buffers, the library's own objects."""


class Peak:
    """The most anonymous memory of this process while it is open, in bytes above what there was."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(INTERVAL):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()
        self.most = max(self.most, anonymous())

    def bytes(self) -> int:
        return self.most - self.start


def anonymous() -> int:
    """Bytes of this process that are backed by no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write(scale: Scale, folder: Path, shard_mb: int) -> int:
    """A random model of this shape as a checkpoint in shards; returns its bytes."""
    lm = undrawn_causal_lm(scale, scale.vocabulary, 0, 0.0, 1, 0)
    write_unfilled(lm, folder, shard_mb * MB)
    return sum(4 * p.numel() for p in lm.parameters())


def rank_main(rank: int, ranks: int, folder: str, shard_mb: int, whole: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    start_process_group(rank, ranks, dist.FileStore(f"{folder}/store{ranks}{whole}", ranks), datetime.timedelta(seconds=600))
    Engine(torch.nn.Linear(2, 2), None, Sharding(3))  # what DeepSpeed imports and allocates for the first engine is no model's
    with Peak() as loading:
        engine = Engine(LanguageModel(load_causal_lm(f"{folder}/model", unfilled=not whole)), None, Sharding(3))
    out = Path(folder) / f"exported{ranks}"
    out.mkdir(exist_ok=True)
    with Peak() as exporting:
        write_model(engine.module, engine.whole, out if rank == 0 else None, shard_mb * MB)
    share = sum(p.ds_tensor.numel() * p.ds_tensor.itemsize for p in engine.module.parameters())  # type: ignore[attr-defined]
    found = {"share": share, "loading": loading.bytes(), "exporting": exporting.bytes()}
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(folder: Path, ranks: int, shard_mb: int, whole: bool = False) -> list[dict[str, int]]:
    """For each rank, in bytes: its share, and its peaks above it.

    Args:
        whole: loaded as without our loader, whole on every rank and cut up then, to compare with.
    """
    multiprocessing.spawn(rank_main, args=(ranks, str(folder), shard_mb, whole), nprocs=ranks)
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="125m")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--shard-mb", type=int, default=200)
    parser.add_argument("--folder", default=None, help="where the checkpoint is written for the time of the measurement")
    asked = parser.parse_args()
    scale = dataclasses.replace(configuration.load([f"scale={asked.scale}"]).scale, vocabulary=50272)
    print("| scale | ranks | model | share | loading, most of any rank | exporting, most of any rank | loading whole |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        size = write(scale, Path(folder) / "model", asked.shard_mb)
        for ranks in asked.ranks:
            found, plain = (measure(Path(folder), ranks, asked.shard_mb, whole) for whole in (False, True))
            cells = [max(rank[what] for rank in found) for what in ("share", "loading", "exporting")]
            cells.append(max(rank["loading"] for rank in plain))
            print(f"| {asked.scale} | {ranks} | " + " | ".join(f"{cell / MB:.0f} MB" for cell in [size, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
