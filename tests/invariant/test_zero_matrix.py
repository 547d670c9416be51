"""Three PPO steps on replayed rollouts give the same numbers at every ZeRO stage, with and without offload, on 1, 2 and 4 ranks.

What is replayed are tokens and scores: the reference's and the policy's log-probs, the critic's values, advantages and both updates (AdamW,
clipped gradients, PPO-ptx) are each cell's own. All cells are held against stage 0 on one rank, which other tests hold against plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from actors.critic import Critic
from actors.models import LanguageModel, ScalarModel, new_causal_lm, save_model
from actors.policy import Policy
from actors.reference import Reference
from actors.worker import RankSpec
from conf.schema import Config
from tests.fakes import END, PAD, VOCABULARY, dialogues, floats, learned, rollouts, smoke, with_section
from tests.pretended_gpu import sleep_and_wake

ROWS, STEPS = 8, 3
FIGURES = {"policy_loss", "value_loss", "kl", "update_kl", "policy_grad_norm", "critic_grad_norm", "clip_share", "entropy", "score"}
"""Among all that are compared."""
Cell = tuple[int, bool, int]
"""ZeRO stage, whether parameters and optimizer are offloaded, ranks."""
OFFLOADED = ("engine.offload_optimizer=cpu", "engine.offload_parameters=cpu")
SMALL = ("scale.width=48", "scale.heads=2", "scale.feed_forward=256")
"""Feed-forward weights are large enough for ZeRO-3 to partition them."""
LARGE = ("scale.width=512", "scale.heads=8", "scale.feed_forward=2100")
"""Two ranks' parts of feed-forward weights are large enough for DeepSpeed to put them into files: 1 MiB."""
# Sums over ranks and micro-batches are taken in another order, which Adam's first steps enlarge: they divide by the gradient's own size.
FIGURE = {"rel": 2e-4, "abs": 2e-5}
WEIGHT = {"atol": 5e-5, "rtol": 1e-4}


def config(stage: int, offload: bool, shape: Sequence[str] = SMALL, more: Sequence[str] = ()) -> Config:
    """Shares of 8, 4 and 2 rows are cut into micro-batches of 3."""
    wide = (*shape, *more, f"engine.zero_stage={stage}", "engine.micro_batch=3")
    ppo = {"lr": 2e-3, "critic_lr": 2e-3, "warmup": 2, "adam_epsilon": 1e-4, "max_grad_norm": 0.5, "minibatches": 1, "epochs": 2}
    return with_section(smoke(*wide, *(OFFLOADED if offload else ())), "ppo", batch=ROWS, ptx=0.5, **ppo)


def saved_models(folder: Path, shape: Sequence[str] = SMALL) -> Path:
    lm = new_causal_lm(config(0, False, shape).scale, VOCABULARY, 0, 0.0, END, PAD)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # distributions that are far from uniform
    for name, model in (("lm", LanguageModel(lm)), ("scalar", ScalarModel(lm.base_model, 0))):
        (folder / name).mkdir()
        save_model(model, model.state_dict(), folder / name)
    return folder


def learn(
    rank: int, ranks: int, stage: int, offload: bool, models: Path, shape: Sequence[str] = SMALL, more: Sequence[str] = (),
    sleeps: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Figures of each step, the policy's and the critic's weights after the last, and how many files hold parts of them meanwhile.

    Args:
        sleeps: between steps every role leaves a pretended GPU to others.
    """
    of = config(stage, offload, shape, more)
    policy = Policy(of, str(models / "lm"), RankSpec("policy", rank, ranks, 1))
    critic = Critic(of, str(models / "scalar"), RankSpec("critic", rank, ranks, 1))
    reference = Reference(of, str(models / "lm"), RankSpec("reference", rank, ranks, 1))
    for role in (policy, critic, reference):
        role.load()
    figures = []
    share = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for step in range(STEPS):
        replayed = [rollouts(step, ROWS).select(share)]
        scores = [floats(step, ROWS, dtype=torch.float32)[share]]
        given = reference.logprobs(replayed, of.ppo.temperature), critic.values(replayed)
        experience = policy.experience(replayed, scores, *given, beta=0.1)
        found = policy.describe()
        texts = [dialogues(10 * step + epoch, ROWS).select(slice(rank, None, ranks)).trimmed() for epoch in range(of.ppo.epochs)]
        figures.append(found | policy.update(experience, texts, step) | critic.update(experience, step))
        for role in (policy, critic, reference) if sleeps else ():
            sleep_and_wake(role.engine)
    weights = {
        f"{name}.{key}": w.clone() for name, role in (("policy", policy), ("critic", critic)) for key, w in role.engine.weights().items()
    }
    folder = of.engine.nvme_path
    return {"figures": figures, "weights": weights, "files": len(list(Path(folder).rglob("*.swp"))) if folder else 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_models(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def wanted(ranks, models: Path) -> dict[str, Any]:
    return ranks(1).run(learn, 0, False, models)[0]


WAYS = ((0, False), (1, False), (2, False), (3, False), (3, True))
CELLS: list[Cell] = [(*way, count) for count in (1, 2, 4) for way in WAYS if (*way, count) != (0, False, 1)]
IN_BRIEF = [cell for cell in CELLS if cell[2] < 4 and cell[0] != 1]


@pytest.mark.parametrize(
    ("stage", "offload", "count"), [cell if cell in IN_BRIEF else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS]
)
def test_three_ppo_steps_agree_with_stage_0_on_one_rank(
    ranks, models: Path, wanted: dict[str, Any], stage: int, offload: bool, count: int
) -> None:
    for found in ranks(count).run(learn, stage, offload, models):
        for step, figures in enumerate(found["figures"]):
            assert learned(figures) == pytest.approx(learned(wanted["figures"][step]), **FIGURE), f"step {step}"
        for name, tensor in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, **WEIGHT, msg=lambda text, name=name: f"{name}: {text}")


ADAPTERS = ("lora.rank=2", "lora.roles=[policy,critic]")
ASLEEP = [(stage, more) for stage in (3, 2) for more in ((), ("engine.offload_optimizer=cpu",), ADAPTERS)]


@pytest.mark.parametrize(("stage", "more"), [cell if cell == (3, ()) else pytest.param(*cell, marks=pytest.mark.slow) for cell in ASLEEP])
def test_ranks_that_sleep_between_steps_learn_what_others_do(
    ranks, models: Path, wanted: dict[str, Any], stage: int, more: tuple[str, ...]
) -> None:
    awake = ranks(1).run(learn, 0, False, models, SMALL, more)[0] if more == ADAPTERS else wanted
    for found in ranks(2).run(learn, stage, False, models, SMALL, more, True):
        for step, figures in enumerate(found["figures"]):
            assert learned(figures) == pytest.approx(learned(awake["figures"][step]), **FIGURE), f"step {step}"
        for name, tensor in awake["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, **WEIGHT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow  # DeepSpeed compiles its reading and writing of files for a minute, once per machine
@pytest.mark.parametrize("optimizer", ["none", "nvme"])
def test_what_rests_in_files_learns_what_it_learns_in_memory(ranks, optimizer: str, tmp_path: Path) -> None:
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io cannot be built here: no libaio with its headers, or no compiler")
    AsyncIOBuilder().load(verbose=False)  # built here once, which takes longer than ranks are waited for
    models = saved_models(tmp_path, LARGE)
    more = ("engine.offload_parameters=nvme", f"engine.offload_optimizer={optimizer}", f"engine.nvme_path={tmp_path}/files")
    wanted = ranks(1).run(learn, 0, False, models, LARGE)[0]
    for found in ranks(2).run(learn, 3, False, models, LARGE, more):
        assert found["files"] > 0
        for step, figures in enumerate(found["figures"]):
            assert learned(figures) == pytest.approx(learned(wanted["figures"][step]), **FIGURE), f"step {step}"
        for name, tensor in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, **WEIGHT, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_compared_is_what_was_promised_and_does_move(wanted: dict[str, Any], models: Path) -> None:
    assert wanted["figures"][0].keys() >= FIGURES
    before = Policy(config(0, False), str(models / "lm"), RankSpec("policy", 0, 1, 1))
    before.load()
    moves = [float((wanted["weights"][f"policy.{name}"] - tensor).abs().mean()) for name, tensor in before.engine.weights().items()]
    assert min(moves) > 20 * WEIGHT["atol"]
