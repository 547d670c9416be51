"""Two ranks on halves of a batch do what one rank does on the whole. Plain gradient descent, as in `test_micro_batches`."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from actors.batch import Comparisons, Experience
from actors.engine import Optimizer, sum_over_ranks
from actors.learning import optimizer_step
from actors.models import LanguageModel
from actors.policy import Policy
from actors.preference_task import PreferenceTask
from actors.worker import RankSpec, make_engine, process_group_of_one, start_process_group
from tests.fakes import comparisons, dialogues, experience, floats, rollouts, saved_lm, smoke, tiny_lm, with_section

ROWS = 8
STAGES = (0, 2)
SIZES = (2, 5, 2, 4)
"""Answers of each prompt: the first rank's share has fewer, so it makes fewer passes."""


def config(zero_stage: int):
    plain = {"lr": 100.0, "warmup": 0, "adam_epsilon": 1e4, "max_grad_norm": 1e9, "minibatches": 1, "batch": ROWS, "ptx": 1.5}
    return with_section(smoke(f"engine.zero_stage={zero_stage}", "engine.micro_batch=3"), "ppo", **plain)


def work(rank: int, ranks: int, checkpoint: str) -> dict[str, Any]:
    """What one rank finds when it does its share of everything."""
    found: dict[str, Any] = {}
    share = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    rows = Experience.join([experience(0, 4), experience(1, 4)]).select(share)
    for stage in STAGES:
        policy = Policy(config(stage), checkpoint, RankSpec("policy", rank, ranks, 1))
        policy.load()
        found[f"figures {stage}"] = policy.update([rows.trimmed()], [dialogues(2, 6).select(slice(rank, None, ranks)).trimmed()], step=0)
        found[f"weights {stage}"] = policy.engine.weights()
        found[f"ranking {stage}"] = ranking(rank, ranks, stage, checkpoint)
    sampled = rollouts(5, ROWS).select(share)
    scores, values = floats(1, ROWS, dtype=torch.float32)[share], torch.zeros(sampled.tokens.shape)
    reference = [0.3 + logprobs for logprobs in policy.logprobs([sampled])]
    found["experience"] = policy.experience([sampled], [scores], reference, [values], beta=0.1)[0]
    found["described"] = policy.describe()
    found["sum"] = float(sum_over_ranks(torch.tensor(float(rank + 1)), torch.device("cpu")))
    return found


def ranking(rank: int, ranks: int, stage: int, checkpoint: str) -> dict[str, torch.Tensor]:
    """Weights of the reward model after one step on this rank's prompts."""
    rows = comparisons(3, SIZES)
    mine: Comparisons = rows.select((rows.group % ranks == rank).nonzero()[:, 0]).trimmed()
    task = PreferenceTask(config(stage), checkpoint, rows, rows, rows, dialogues(1, 3), True)
    engine = make_engine(task.config, task.module(), Optimizer(1.0, 0.0, 1e9, 1e4))
    optimizer_step(engine, task.loss(engine, mine), 3, 100.0)
    return engine.weights()


def rank_main(rank: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    start_process_group(rank, 2, dist.FileStore(f"{folder}/store", 2), datetime.timedelta(seconds=60))
    torch.save(work(rank, 2, f"{folder}/lm"), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(one rank on the whole, two ranks on their halves)."""
    folder = tmp_path_factory.mktemp("ranks")
    saved_lm(folder / "lm")
    multiprocessing.spawn(rank_main, args=(str(folder),), nprocs=2)
    process_group_of_one()
    return work(0, 1, str(folder / "lm")), [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["weights", "ranking"])
def test_an_update_by_two_ranks_gives_the_weights_of_one_rank_on_the_whole_batch(found, what: str, stage: int) -> None:
    one, two = found
    for rank in two:
        for name, tensor in one[f"{what} {stage}"].items():
            torch.testing.assert_close(rank[f"{what} {stage}"][name], tensor, atol=1e-5, rtol=1e-5)


def test_the_update_does_move_the_weights(found) -> None:
    one, _ = found
    before = LanguageModel(tiny_lm()).state_dict()
    for stage in STAGES:
        assert max(float((one[f"weights {stage}"][name] - tensor).abs().max()) for name, tensor in before.items()) > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_both_ranks_report_the_figures_of_the_whole_batch(found, stage: int) -> None:
    one, two = found
    for rank in two:
        assert rank[f"figures {stage}"] == pytest.approx(one[f"figures {stage}"], rel=1e-4, abs=1e-5)


def test_advantages_are_whitened_over_the_tokens_of_all_ranks(found) -> None:
    one, two = found
    together = Experience.join([rank["experience"] for rank in two])
    for name in ("advantages", "returns", "old_logprobs"):
        torch.testing.assert_close(getattr(together, name), getattr(one["experience"], name), atol=1e-5, rtol=1e-5)
    means = [float(rank["experience"].advantages[rank["experience"].mask].mean()) for rank in two]
    assert min(map(abs, means)) > 0.05  # whitened on its own, each half would have mean 0
    assert float(together.advantages[together.mask].mean()) == pytest.approx(0, abs=1e-5)


def test_the_samples_figures_are_those_of_all_ranks(found) -> None:
    one, two = found
    for rank in two:
        assert rank["described"] == pytest.approx(one["described"], rel=1e-5, abs=1e-6)


def test_sums_run_over_ranks(found) -> None:
    _, two = found
    assert [rank["sum"] for rank in two] == [3.0, 3.0]
