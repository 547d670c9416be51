"""Figures of samples: made by hand, and the same however they are spread over ranks."""

from __future__ import annotations

import threading

import pytest
import torch

from actors.batch import Rollouts
from actors.sample_figures import Ranks, repetition, sample_figures
from tests.fakes import floats, rollouts


def replies(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask): one prompt token, then the reply."""
    width = 1 + max(map(len, rows))
    tokens = torch.tensor([[9, *row, *[0] * (width - 1 - len(row))] for row in rows])
    mask = torch.tensor([[False, *[True] * len(row), *[False] * (width - 1 - len(row))] for row in rows])
    return tokens, mask


def test_distinct_n_and_duplicates_are_counted_by_hand() -> None:
    found = repetition(*replies([1, 2, 1, 2], [1, 2], [3], [1, 2]), Ranks())
    assert found["duplicate_share"] == pytest.approx(1 / 4)
    assert found["distinct_1"] == pytest.approx(3 / 9)  # 1, 2, 3
    assert found["distinct_2"] == pytest.approx(2 / 5)  # 12, 21 of 12 21 12 12 12
    assert found["distinct_3"] == 1.0  # 121, 212


def test_prompts_do_not_count_as_said() -> None:
    tokens, mask = replies([4, 5], [4, 6])
    tokens[0, 0], tokens[1, 0] = 7, 8
    other = tokens.clone()
    other[:, 0] = 1
    assert repetition(tokens, mask, Ranks()) == repetition(other, mask, Ranks())


class Meeting:
    """Sums over threads that stand for ranks."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.parts = count, threading.Barrier(count), {}

    def reduce(self, rank: int):
        def summed(x: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = x
            self.barrier.wait()
            total = sum(self.parts[r] for r in range(self.count))
            self.barrier.wait()
            return total

        return summed


def test_two_ranks_find_what_one_finds() -> None:
    whole = Rollouts.join([rollouts(0, 6), rollouts(3, 4), rollouts(0, 6).select([0, 1])])  # with replies that are alike across the cut
    whole.version[:] = torch.arange(len(whole))
    given = floats(1, 12), -floats(2, *whole.tokens.shape).abs().float(), -floats(3, *whole.tokens.shape).abs().float()
    alone = sample_figures(whole, *given, Ranks())
    meeting, found = Meeting(2), {}

    def work(rank: int, rows: slice) -> None:
        found[rank] = sample_figures(whole.select(rows), *(x[rows] for x in given), Ranks(meeting.reduce(rank), rank, 2))

    threads = [threading.Thread(target=work, args=(rank, rows)) for rank, rows in enumerate((slice(0, 7), slice(7, 12)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert alone == pytest.approx(found[0], rel=1e-5)
    assert (alone["weight_version_min"], alone["weight_version_max"]) == (0, 11)
    assert alone["duplicate_share"] > 0 and alone["engine_gap_max"] > alone["engine_gap_mean"] > 0
