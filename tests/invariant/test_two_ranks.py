"""Two ranks on halves of a batch do what one rank does on the whole. Plain gradient descent, as in `test_micro_batches`."""

from __future__ import annotations

import datetime
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM

from actors import models
from actors.batch import Comparisons, Dialogues, Experience
from actors.engine import Engine, sum_over_ranks
from actors.learning import optimizer_step
from actors.micro_batches import Limit
from actors.models import LanguageModel, shape_config
from actors.policy import Policy
from actors.preference_task import PreferenceTask
from actors.sharding import Optimizer, Sharding
from actors.worker import RankSpec, make_engine, process_group_of_one, start_process_group
from tests.fakes import comparisons, dialogues, experience, floats, learned, rollouts, saved_lm, smoke, tiny_lm, with_section

ROWS = 8
STAGES = (0, 2)
SIZES = (2, 5, 2, 4)
"""Answers of each prompt: the first rank's share has fewer, so it makes fewer passes."""


def config(zero_stage: int):
    plain = {"lr": 100.0, "warmup": 0, "adam_epsilon": 1e4, "max_grad_norm": 1e9, "minibatches": 1, "batch": ROWS, "ptx": 1.5}
    plain |= {"dual_clip": 1.25, "entropy": 0.3, "importance_cap": 1.1}
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
    sampled.keys[:, 0] = torch.arange(ROWS)[share] // 2  # two replies to each prompt
    for advantage in ("rloo", "grpo", "reinforce"):
        policy.config = with_section(config(0), "ppo", advantage=advantage)
        found[advantage] = policy.experience([sampled], [scores], reference, [], beta=0.1)[0]
    policy.config = with_section(config(0), "ppo", old_logprobs="behaviour", engine_gap_limit=0.1)
    policy.weights(version=0)
    (own,) = policy.logprobs([sampled])
    for name, gap in (("near", 0.05), ("far on one rank", 0.15 * 2 * (rank == ranks - 1))):
        sampled.behaviour = (own + gap) * sampled.mask
        found[name] = policy.experience([sampled], [scores], reference, [values], beta=0.1)[0], policy.describe()
    found["partitioned"] = partitioned(rank, ranks, 3)
    found["sum"] = float(sum_over_ranks(torch.tensor(float(rank + 1)), torch.device("cpu")))
    return found


def partitioned(rank: int, ranks: int, stage: int) -> dict[str, torch.Tensor]:
    """Weights after a step of a model whose output embedding is large enough for ZeRO-3 to partition it; micro-batches of other lengths
    on each rank, so that their logits come in other numbers of chunks."""
    shape = shape_config(smoke("scale.width=32", "scale.heads=2").scale, 1000, 0.0, 1, 0)
    shape.tie_word_embeddings = False
    torch.manual_seed(0)
    module = LanguageModel(AutoModelForCausalLM.from_config(shape, dtype=torch.float32))
    engine = Engine(module, Optimizer(1.0, 0.0, 1e9, 1e4), Sharding(stage, micro_batch=2))
    engine.train(False)
    rows = dialogues(7, 4).select(slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)).trimmed()
    with torch.no_grad():
        engine(rows.tokens, rows.mask, 0.7)

    def loss(piece: Dialogues) -> torch.Tensor:
        logprobs, entropy = engine(piece.tokens, piece.mask, 0.7)
        return (logprobs + 0.1 * entropy)[piece.mask].sum() / 10

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "token_logprobs", functools.partial(models.token_logprobs, chunk=2 * 1000))
        optimizer_step(engine, [(loss, rows)], Limit(2), 100.0)
    return engine.weights()


def ranking(rank: int, ranks: int, stage: int, checkpoint: str) -> dict[str, torch.Tensor]:
    """Weights of the reward model after one step on this rank's prompts."""
    rows = comparisons(3, SIZES)
    mine: Comparisons = rows.select((rows.group % ranks == rank).nonzero()[:, 0]).trimmed()
    task = PreferenceTask(config(stage), checkpoint, rows, rows, rows, comparisons(1, (3,)), True)
    engine = make_engine(task.config, task.module(), Optimizer(1.0, 0.0, 1e9, 1e4))
    optimizer_step(engine, task.loss(engine, mine), Limit(3), 100.0)
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
        assert learned(rank[f"figures {stage}"]) == pytest.approx(learned(one[f"figures {stage}"]), rel=1e-4, abs=1e-5)


def test_advantages_are_whitened_over_the_tokens_of_all_ranks(found) -> None:
    one, two = found
    together = Experience.join([rank["experience"] for rank in two])
    for name in ("advantages", "returns", "old_logprobs"):
        torch.testing.assert_close(getattr(together, name), getattr(one["experience"], name), atol=1e-5, rtol=1e-5)
    means = [float(rank["experience"].advantages[rank["experience"].mask].mean()) for rank in two]
    assert min(map(abs, means)) > 0.05  # whitened on its own, each half would have mean 0
    assert float(together.advantages[together.mask].mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_advantages_without_a_critic_are_those_of_the_whole_batch_on_one_rank(found, advantage: str) -> None:
    one, two = found
    together = Experience.join([rank[advantage] for rank in two])
    torch.testing.assert_close(together.advantages, one[advantage].advantages, atol=1e-5, rtol=1e-5)
    assert float(together.advantages[together.mask].abs().max()) > 0.1
    assert not together.returns.any() and not together.old_values.any()


def test_ranks_take_the_engines_log_probs_together_or_not_at_all(found) -> None:
    _, two = found
    for name, stands_in in (("near", 1.0), ("far on one rank", 0.0)):  # the far one's mean over both ranks is beyond the limit
        assert [rank[name][1]["old_from_behaviour"] for rank in two] == [stands_in] * 2
        assert two[0][name][1]["engine_gap_mean"] == two[1][name][1]["engine_gap_mean"]
    for rank in two:
        assert not torch.equal(rank["near"][0].old_logprobs, rank["far on one rank"][0].old_logprobs)


def test_a_partitioned_output_embedding_learns_what_a_whole_one_does(found) -> None:
    one, two = found
    whole = partitioned(0, 1, 0)
    for weights in (one["partitioned"], *(rank["partitioned"] for rank in two)):
        assert weights.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_samples_figures_are_those_of_all_ranks(found) -> None:
    one, two = found
    for rank in two:
        assert learned(rank["described"]) == pytest.approx(learned(one["described"]), rel=1e-5, abs=1e-6)


def test_sums_run_over_ranks(found) -> None:
    _, two = found
    assert [rank["sum"] for rank in two] == [3.0, 3.0]
