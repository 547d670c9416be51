"""Under ZeRO-3 a rank never holds more than its share and one shard, on the way in and on the way out."""

from __future__ import annotations

import dataclasses

import pytest

from tests.benchmarks.loading import ALLOWANCE_MB, MB, measure, write
from tests.fakes import smoke

SHARD_MB = 75
"""As large as the embedding: an export that held it twice would be noticed."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, int]]]:
    """(bytes of the whole model, what each of two ranks held)."""
    folder = tmp_path_factory.mktemp("loading")
    shape = {"architecture": "opt", "layers": 8, "width": 768, "heads": 12, "feed_forward": 3072, "vocabulary": 24000}
    scale = dataclasses.replace(smoke().scale, **shape)
    return write(scale, folder / "model", SHARD_MB), measure(folder, 2, SHARD_MB)


def test_loading_takes_one_ranks_share_and_a_shard(found: tuple[int, list[dict[str, int]]]) -> None:
    size, ranks = found
    for rank in ranks:
        assert rank["share"] == pytest.approx(size / 2, rel=0.01)
        assert rank["loading"] < rank["share"] + (SHARD_MB + ALLOWANCE_MB) * MB < size - 30 * MB


def test_exporting_takes_a_shard_where_it_is_written_and_nothing_elsewhere(found: tuple[int, list[dict[str, int]]]) -> None:
    writes, other = found[1]
    assert writes["exporting"] < (SHARD_MB + ALLOWANCE_MB) * MB
    assert other["exporting"] < ALLOWANCE_MB * MB, "rank 0 collects; gathering would give the embedding to all"
