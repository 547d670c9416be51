"""The size of a micro-batch, padding and batch neighbours change no number.

The optimizer's epsilon is so large here that a step is plain gradient descent: AdamW as usual would hide a wrong scale of the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.algorithms.calibration import calibration_error
from actors.algorithms.kl import k1
from actors.algorithms.ppo import policy_loss
from actors.algorithms.preference import pointwise_loss
from actors.batch import Comparisons, Dialogues, Experience, Rollouts
from actors.critic import Critic
from actors.language_task import LanguageTask
from actors.learning import optimizer_step
from actors.micro_batches import Limit, limit
from actors.models import LanguageModel, load_causal_lm
from actors.policy import Policy
from actors.preference_task import SCORES_FILE, PreferenceTask
from actors.reference import Reference
from actors.reward import Reward
from actors.sharding import Optimizer
from actors.worker import RankSpec, Worker, make_engine, process_group_of_one
from tests.fakes import comparisons, dialogues, experience, floats, rollouts, saved_lm, saved_scalar, smoke, tiny_lm, with_section

ROWS = 8
SGD = Optimizer(lr=1.0, weight_decay=0.0, max_grad_norm=1e9, epsilon=1e4)
RATE = 1e4 * 1e-2
"""The rate at which AdamW with that epsilon moves weights by about a hundredth of their gradients."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    process_group_of_one()
    root = tmp_path_factory.mktemp("models")
    return {"lm": saved_lm(root / "lm"), "scalar": saved_scalar(root / "scalar")}


Size = int | str
"""Rows of a micro-batch, or another setting of the engine."""


def config(size: Size = 4, **ppo: object):
    plain = {"lr": RATE, "critic_lr": RATE, "warmup": 0, "adam_epsilon": 1e4, "max_grad_norm": 1e9, "minibatches": 1, "batch": ROWS}
    return with_section(smoke(f"engine.micro_batch={size}" if isinstance(size, int) else f"engine.{size}"), "ppo", **(plain | ppo))


def role(kind: type[Worker], checkpoint: str, of) -> Worker:
    worker = kind(of, checkpoint, RankSpec(kind.__name__, 0, 1, torch.get_num_threads()))
    worker.load()
    return worker


def weights(worker: Worker) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in worker.engine.weights().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[name] - before[name]).abs().max()) for name in before)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5)


Updated = tuple[dict[str, Tensor], dict[str, float]]


EXTRAS = {"dual_clip": 1.25, "entropy": 0.3, "importance_cap": 1.1}


def policy_updated(folders: dict[str, str], size: Size, ptx: float = 0.0, **ppo: float) -> Updated:
    policy = role(Policy, folders["lm"], config(size, ptx=ptx, **ppo))
    before = weights(policy)
    figures = policy.update([experience(0, 5), experience(1, 3)], [dialogues(2, 6)] if ptx else [], step=0)
    assert moved(before, weights(policy)) > 1e-4
    return weights(policy), figures


def critic_updated(folders: dict[str, str], size: Size) -> Updated:
    critic = role(Critic, folders["scalar"], config(size))
    before = weights(critic)
    figures = critic.update([experience(0, 5), experience(1, 3)], step=0)
    assert moved(before, weights(critic)) > 1e-4
    return weights(critic), figures


def task_updated(task: LanguageTask | PreferenceTask, rows: Dialogues | Comparisons, size: Size) -> Updated:
    engine = make_engine(task.config, task.module(), SGD)
    before = {name: tensor.clone() for name, tensor in engine.weights().items()}
    norm = optimizer_step(engine, task.loss(engine, rows), limit(task.config.engine, engine), RATE)
    after = {name: tensor.clone() for name, tensor in engine.weights().items()}
    assert moved(before, after) > 1e-4
    return after, {"grad_norm": norm}


def sft_updated(folders: dict[str, str], size: Size) -> Updated:
    rows = dialogues(0, ROWS)
    return task_updated(LanguageTask(config(size), folders["lm"], rows, rows, rows, 100), rows, size)


def preference_updated(folders: dict[str, str], size: Size, ranked: bool) -> Updated:
    rows = comparisons(0)
    if not ranked:
        rows.label, rows.group = (rows.label > 0).float(), torch.arange(len(rows))
    task = PreferenceTask(config(size), folders["lm"], rows, rows, rows, comparisons(1, (3,)), ranked)
    return task_updated(task, rows, size)


UPDATES: dict[str, Callable[[dict[str, str], Size], Updated]] = {
    "policy": policy_updated,
    "policy with extras": lambda folders, size: policy_updated(folders, size, **EXTRAS),
    "policy with ptx": lambda folders, size: policy_updated(folders, size, ptx=2.0),
    "critic": critic_updated,
    "sft": sft_updated,
    "ranking": lambda folders, size: preference_updated(folders, size, True),
    "judgements": lambda folders, size: preference_updated(folders, size, False),
}


@pytest.mark.parametrize("name", UPDATES)
def test_one_optimizer_step_is_the_same_for_micro_batches_of_1_3_and_8_rows_and_of_20_tokens(name: str, folders: dict[str, str]) -> None:
    whole, figures = UPDATES[name](folders, ROWS)
    figures.pop("learning_padding", None)
    for size in (1, 3, "micro_tokens=20"):
        pieces, found = UPDATES[name](folders, size)
        found.pop("learning_padding", None)
        assert_same(whole, pieces)
        assert found == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_the_policys_step_is_gradient_descent_on_the_loss_of_the_whole_batch(folders: dict[str, str]) -> None:
    updated, _ = policy_updated(folders, 3)
    model = LanguageModel(tiny_lm())
    rows = Experience.join([experience(0, 5), experience(1, 3)])
    logprobs, _ = model(rows.tokens, rows.mask)
    ratio = (logprobs - rows.old_logprobs).exp()
    objective = torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.2) * rows.advantages)
    (-objective[rows.mask].mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(updated[name], parameter.detach() - 1e-2 * parameter.grad, atol=1e-5, rtol=1e-4)


def test_dual_clip_importance_weights_and_entropy_bonus_are_in_the_loss_of_the_whole_batch(folders: dict[str, str]) -> None:
    updated, figures = policy_updated(folders, 3, **EXTRAS)
    model = LanguageModel(tiny_lm())
    rows = Experience.join([experience(0, 5), experience(1, 3)])
    logprobs, entropy = model(rows.tokens, rows.mask)
    ratio, weight = (logprobs - rows.old_logprobs).exp(), (rows.old_logprobs - rows.behaviour).exp()
    objective = torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.2) * rows.advantages)
    objective = torch.where(rows.advantages < 0, torch.maximum(objective, 1.25 * rows.advantages), objective)
    loss = -(weight.clamp(max=1.1) * objective)[rows.mask].mean()
    (loss - 0.3 * entropy[rows.mask].mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(updated[name], parameter.detach() - 1e-2 * parameter.grad, atol=1e-5, rtol=1e-4)
    wanted = {
        "policy_loss": loss,
        "entropy": entropy[rows.mask].mean(),
        "importance_mean": weight[rows.mask].clamp(max=1.1).mean(),
        "importance_truncated": (weight[rows.mask] > 1.1).float().mean(),
        "dual_clip_share": ((rows.advantages < 0) & (ratio > 1.25))[rows.mask].float().mean(),
    }
    assert {name: figures[name] for name in wanted} == pytest.approx({name: float(x) for name, x in wanted.items()}, abs=1e-5)
    assert min(figures["importance_truncated"], figures["dual_clip_share"]) > 0


def test_without_their_settings_the_extras_leave_plain_ppo_and_say_so(folders: dict[str, str]) -> None:
    _, figures = policy_updated(folders, 3)
    assert (figures["importance_mean"], figures["importance_truncated"], figures["dual_clip_share"]) == (pytest.approx(1.0), 0.0, 0.0)


def test_ptx_0_is_plain_ppo_bit_by_bit_whether_or_not_there_is_text(folders: dict[str, str]) -> None:
    found = []
    for text in ([], [dialogues(2, 6)]):
        policy = role(Policy, folders["lm"], config(4, ptx=0.0))
        figures = policy.update([experience(0, 5), experience(1, 3)], text, step=0)
        found.append((weights(policy), figures))
    assert found[0][1] == found[1][1]
    assert moved(found[0][0], found[1][0]) == 0.0
    engine = make_engine(config(4), LanguageModel(load_causal_lm(folders["lm"])), SGD)  # and PPO with no word of text in it
    rows = Experience.join([experience(0, 5), experience(1, 3)])
    tokens = float(rows.mask.sum())

    def plain(piece: Experience) -> Tensor:
        logprobs, _ = engine(piece.tokens, piece.mask, 1.0, piece.lengths)
        return policy_loss(logprobs, piece.old_logprobs, piece.advantages, piece.mask, 0.2, tokens).loss

    engine.train(False)
    optimizer_step(engine, [(plain, rows)], Limit(4, padded=False), RATE)
    assert moved(found[0][0], engine.weights()) == 0.0
    assert moved(found[0][0], policy_updated(folders, 4, ptx=1e-3)[0]) > 0.0


def test_ptx_adds_gamma_times_the_language_loss_to_the_same_step(folders: dict[str, str]) -> None:
    without, _ = policy_updated(folders, 4)
    updated, _ = policy_updated(folders, 4, ptx=2.0)
    model, extra = LanguageModel(tiny_lm()), dialogues(2, 6)
    logprobs, _ = model(extra.tokens, extra.mask)
    (-2.0 * logprobs[extra.mask].mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(updated[name] - without[name], -1e-2 * parameter.grad, atol=1e-5, rtol=1e-3)


def calls(folders: dict[str, str]) -> dict[str, Callable[[list[Rollouts]], list[Tensor]]]:
    policy, critic = role(Policy, folders["lm"], config()), role(Critic, folders["scalar"], config())
    reference, reward = role(Reference, folders["lm"], config()), role(Reward, folders["scalar"], config())
    return {
        "log-probs": policy.logprobs,
        "values": critic.values,
        "reference log-probs": lambda pieces: reference.logprobs(pieces, 0.7),
        "scores": reward.score,
    }


@pytest.mark.parametrize("name", ["log-probs", "values", "reference log-probs", "scores"])
def test_padding_and_neighbours_change_no_log_prob_value_or_score(name: str, folders: dict[str, str]) -> None:
    call, rows = calls(folders)[name], rollouts(3, 6)
    (together,) = call([rows])
    longer = Rollouts.join([rows, rollouts(4, 1, reply=20).select(slice(0, 1))])
    assert longer.tokens.shape[1] > rows.tokens.shape[1]
    (padded,) = call([longer.select(slice(0, 6))])
    spoilt = longer.select(slice(0, 6))
    spoilt.tokens[torch.arange(longer.tokens.shape[1])[None, :] >= spoilt.lengths[:, None]] = 7
    (other_padding,) = call([spoilt])
    alone = call([rows.select([n]).trimmed() for n in range(6)])
    for n in range(6):
        for found in (padded[n : n + 1], other_padding[n : n + 1], alone[n]):
            if together.dim() == 1:
                torch.testing.assert_close(found, together[n : n + 1], atol=1e-5, rtol=1e-5)
            else:
                width = int(rows.lengths[n])
                torch.testing.assert_close(found[:, :width], together[n : n + 1, :width], atol=1e-5, rtol=1e-5)
                assert not found[:, width:].any()


def test_the_first_minibatch_has_ratio_1_and_a_policy_equal_to_the_reference_has_no_kl(folders: dict[str, str]) -> None:
    of = config(4, temperature=0.8, minibatches=2, epochs=2)
    policy, reference = role(Policy, folders["lm"], of), role(Reference, folders["lm"], of)
    pieces = rollouts(5, ROWS).split(4)
    scores = [floats(n, 4, dtype=torch.float32) for n in range(2)]
    values = [0.1 * floats(n, *piece.tokens.shape, dtype=torch.float32) * piece.mask for n, piece in enumerate(pieces)]
    made = policy.experience(pieces, scores, reference.logprobs(pieces, 0.8), values, beta=0.1)
    assert (
        float(sum((k1(e.old_logprobs, r) * e.mask).abs().sum() for e, r in zip(made, reference.logprobs(pieces, 0.8), strict=True))) == 0.0
    )
    figures = policy.update(made, [], step=0)
    assert figures["first_clip_share"] == 0.0
    assert figures["first_kl"] == pytest.approx(0.0, abs=1e-9)
    assert figures["update_kl"] > 1e-6  # later minibatches see the weights move
    assert policy.describe()["kl"] == 0.0
    assert policy.describe()["score"] == pytest.approx(float(torch.cat(scores).mean()), abs=1e-6)


def test_advantages_are_whitened_over_all_pieces_together_and_returns_are_not(folders: dict[str, str]) -> None:
    rows = rollouts(6, ROWS)
    scores = floats(1, ROWS, dtype=torch.float32)
    values = 0.5 * floats(2, *rows.tokens.shape, dtype=torch.float32) * rows.mask

    def made(size: int, whiten: bool) -> Experience:
        policy = role(Policy, folders["lm"], config(4, whiten=whiten))
        order = [slice(n, n + size) for n in range(0, ROWS, size)]
        pieces = [rows.select(part) for part in order]
        reference = [0.3 + logprobs for logprobs in policy.logprobs(pieces)]
        return Experience.join(policy.experience(pieces, [scores[p] for p in order], reference, [values[p] for p in order], beta=0.1))

    white, raw = made(2, True), made(2, False)
    counted = white.advantages[white.mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-5)
    assert float(counted.var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert not white.advantages[~white.mask].any()
    torch.testing.assert_close(white.returns, raw.returns)
    torch.testing.assert_close(raw.returns, (raw.advantages + values) * rows.mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(ROWS, True).advantages, white.advantages, atol=1e-5, rtol=1e-5)


def test_reference_and_reward_never_move_and_need_no_gradients(folders: dict[str, str]) -> None:
    of = config(4)
    reference, reward = role(Reference, folders["lm"], of), role(Reward, folders["scalar"], of)
    frozen = [reference, reward.sources[0][2]]
    before = [weights(one) for one in frozen]
    policy = role(Policy, folders["lm"], of)
    pieces = rollouts(5, ROWS).split(4)
    found = reference.logprobs(pieces, 1.0)
    values = [torch.zeros(piece.tokens.shape) for piece in pieces]
    policy.update(policy.experience(pieces, reward.score(pieces), found, values, 0.1), [], step=0)
    assert moved(weights(reference), weights(policy)) > 1e-5
    for worker, was in zip(frozen, before, strict=True):
        assert moved(was, weights(worker)) == 0.0
        assert not any(p.requires_grad for p in worker.engine.module.parameters())
    assert not any(tensor.requires_grad for tensor in [*found, *reward.score(pieces)])


@pytest.mark.parametrize("ranked", [True, False], ids=["rankings", "judgements"])
def test_the_reward_models_zero_is_the_demonstrations_mean_and_calibration_is_that_of_the_scores_before(
    ranked: bool, folders: dict[str, str]
) -> None:
    rows, shown = comparisons(0), comparisons(1, (5,))
    if not ranked:
        rows.label, rows.group = (rows.label > 0).float(), torch.arange(len(rows))
    task = PreferenceTask(config(4), folders["scalar"], rows, rows, rows, shown, ranked)
    engine = make_engine(task.config, task.module(), SGD)
    engine.shift_bias("head.bias", 2.0)
    before, scores = task.scores_of(engine, shown), task.scores_of(engine, rows)
    figures, texts = task.finish(engine)
    assert figures["zero"] == pytest.approx(float(before.mean()), abs=1e-5) and abs(figures["zero"]) > 1
    assert figures["demonstration_score"] == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(task.scores_of(engine, shown), before - before.mean(), atol=1e-5, rtol=1e-5)
    after = torch.tensor(json.loads(texts[SCORES_FILE]))
    torch.testing.assert_close(after, scores - before.mean(), atol=1e-5, rtol=1e-5)
    if not ranked:
        good = float(rows.label.sum())
        weight = (len(rows) - good) / good
        wanted = calibration_error(torch.sigmoid(scores) / (torch.sigmoid(scores) + weight * (1 - torch.sigmoid(scores))), rows.label)
        assert figures["heldout_calibration_error"] == pytest.approx(wanted, abs=1e-5)
        assert figures["heldout_loss"] == pytest.approx(float(pointwise_loss(scores, rows.label, weight, float(len(rows)))), abs=1e-5)


def test_going_back_gives_the_weights_sent_before_the_last_and_exports_them(folders: dict[str, str], tmp_path: Path) -> None:
    policy = role(Policy, folders["lm"], config(4))
    policy.weights(version=2)
    policy.update([experience(1, ROWS)], [], step=0)
    policy.weights(version=3)
    before = weights(policy)
    policy.update([experience(0, ROWS)], [], step=1)
    policy.weights(version=4)
    assert moved(before, weights(policy)) > 1e-4
    assert policy.go_back() == 3
    assert moved(before, weights(policy)) == 0.0
    policy.export(str(tmp_path))
    assert moved(before, weights(role(Reference, str(tmp_path), config(4)))) == 0.0


def sent_by(policy: Policy, version: int) -> np.ndarray:
    (update,) = [policy.weights(version, bucket) for bucket in range(policy.bucket_count())]
    assert update is not None
    return update.flat


def test_a_resumed_policy_learns_on_bit_by_bit_and_can_still_go_back(folders: dict[str, str], tmp_path: Path) -> None:
    one = role(Policy, folders["lm"], config(4))
    sent = [sent_by(one, 0)]
    one.update([experience(0, ROWS)], [], step=0)
    sent.append(sent_by(one, 1))
    one.save_state(str(tmp_path))
    other = role(Policy, folders["lm"], config(4))
    other.load_state(str(tmp_path))
    assert (sent_by(other, 1) == sent[1]).all()
    for policy in (one, other):
        policy.update([experience(1, ROWS)], [], step=1)
    assert moved(weights(one), weights(other)) == 0.0
    assert other.go_back() == 0
    assert (sent_by(other, 2) == sent[0]).all()
