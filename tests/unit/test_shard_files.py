"""Files that ranks write their shares to: any cut of any tensor is read back as it was, and what is missing or strange is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from actors import shard_files
from actors.shard_files import Run, ShardReader, ShardWriter, share
from actors.worker import process_group_of_one
from tests.fakes import floats, quickly

TENSORS = {"a": floats(0, 3, 5), "b.weight": floats(1, 7).bfloat16(), "one": floats(2), "none": torch.empty(0), "count": torch.arange(4)}


def write(folder: Path, ranks: int, tensors: dict[str, Tensor], only: int | None = None) -> Path:
    """As `ranks` ranks would; or the file of one of them alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks) if only is None else (only,):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(shard_files.dist, "get_rank", lambda rank=rank: rank)
            patched.setattr(shard_files.dist, "get_world_size", lambda: ranks)
            runs = {name: share(name, tensor.shape, rank, ranks) for name, tensor in tensors.items()}
            with ShardWriter(folder, [("weight", run, tensors[name].dtype) for name, run in runs.items()], {"by": rank}) as file:
                for name, run in runs.items():
                    file.write(tensors[name].reshape(-1)[run.start : run.start + run.length])
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_what_some_ranks_wrote_is_read_in_any_other_cut(ranks: int, tmp_path: Path) -> None:
    saved = ShardReader(write(tmp_path / "s", ranks, TENSORS))
    assert saved.notes == {"by": 0}
    for readers in (1, 2, 3, 5):
        for name, tensor in TENSORS.items():
            parts = [saved.read("weight", share(name, tensor.shape, rank, readers)) for rank in range(readers)]
            assert torch.equal(torch.cat(parts).view(tensor.shape), tensor)
            assert all(part.dtype == tensor.dtype for part in parts if len(part))


@quickly
@given(shape=st.lists(st.integers(1, 6), max_size=3), ranks=st.integers(1, 9))
def test_shares_cover_a_tensor_once_and_differ_by_one_length_but_for_the_last(shape: list[int], ranks: int) -> None:
    runs = [share("x", shape, rank, ranks) for rank in range(ranks)]
    whole = [place for run in runs for place in range(run.start, run.start + run.length)]
    assert whole == list(range(math.prod(shape)))
    assert max(run.length for run in runs) == -(-math.prod(shape) // ranks)


def test_a_file_is_plain_safetensors(tmp_path: Path) -> None:
    write(tmp_path, 2, TENSORS)
    (first, second) = sorted(tmp_path.iterdir())
    assert torch.equal(load_file(first)["weight/a"], TENSORS["a"].view(-1)[:8])
    assert torch.equal(load_file(second)["weight/a"], TENSORS["a"].view(-1)[8:])
    with safe_open(first, "pt") as file:
        assert set(file.keys()) == {f"weight/{name}" for name in TENSORS}


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no shards"):
        ShardReader(tmp_path)
    write(tmp_path, 3, TENSORS, only=0)
    write(tmp_path, 3, TENSORS, only=2)
    with pytest.raises(FileNotFoundError, match="written by 3 ranks, but holds the files of 2"):
        ShardReader(tmp_path)


def test_another_shape_an_unknown_name_and_missing_elements_are_named(tmp_path: Path) -> None:
    saved = ShardReader(write(tmp_path, 2, TENSORS))
    with pytest.raises(ValueError, match=r"a has shape \[3, 5\] there, and shape \[5, 3\] in this model"):
        saved.read("weight", Run("a", (5, 3), 0, 15))
    with pytest.raises(ValueError, match="c is not there"):
        saved.read("weight", Run("c", (1,), 0, 1))
    with pytest.raises(ValueError, match="elements of exp_avg of a are missing"):
        saved.read("exp_avg", Run("a", (3, 5), 0, 15))
    assert saved.has("weight", "a") and not saved.has("exp_avg", "a") and not saved.has("weight", "c")


def test_a_writer_takes_what_was_planned_and_nothing_else(tmp_path: Path) -> None:
    process_group_of_one()
    planned = [("weight", Run("a", (4,), 0, 4), torch.float32)]
    with (
        pytest.raises(ValueError, match="3 elements of torch.float32 were given, 4 of torch.float32 were planned"),
        ShardWriter(tmp_path, planned, {}) as file,
    ):
        file.write(torch.zeros(3))
    with pytest.raises(ValueError, match="1 planned runs were not written, a the first"), ShardWriter(tmp_path, planned, {}):
        pass
