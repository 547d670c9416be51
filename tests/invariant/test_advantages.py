"""What advantages and old log-probs depend on, seen from the policy that makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.batch import Experience, Rollouts
from actors.policy import Policy
from actors.worker import RankSpec, process_group_of_one
from tests import references
from tests.fakes import experience, floats, rollouts, saved_lm, smoke, with_section

ROWS = 8
BETA = 0.1


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A policy whose weights were sent as version 0, as the fakes' rollouts say of theirs."""
    process_group_of_one()
    worker = Policy(smoke(), saved_lm(tmp_path_factory.mktemp("lm")), RankSpec("policy", 0, 1, 1))
    worker.load()
    worker.weights(version=0)
    return worker


def sampled(same_length: bool = False) -> Rollouts:
    """Two replies to each of four prompts; all of three tokens if they are to end at the same step."""
    rows = rollouts(5, ROWS)
    rows.keys[:, 0], rows.keys[:, 1] = torch.arange(ROWS) // 2, torch.arange(ROWS) % 2
    if same_length:
        columns = torch.arange(rows.tokens.shape[1])[None, :]
        rows.mask = (columns >= rows.lengths[:, None] - 3) & (columns < rows.lengths[:, None])
    return rows


def reference_of(rows: Rollouts) -> Tensor:
    return rows.mask * (0.3 * floats(3, *rows.tokens.shape, dtype=torch.float32) - 2)


def made(policy: Policy, rows: Rollouts, shift: float = 0.0, size: int = 4, **ppo: Any) -> Experience:
    """Experience of the rows in pieces, with scores moved by `shift`."""
    policy.config = with_section(smoke(), "ppo", **({"reward_clip": 100.0} | ppo))
    scores = floats(1, ROWS, dtype=torch.float32) + shift
    with_values = policy.config.ppo.has_critic()
    values = (0.5 * floats(2, *rows.tokens.shape, dtype=torch.float32) * rows.mask).split(size) if with_values else []
    pieces = rows.split(size)
    reference = list(reference_of(rows).split(size))
    return Experience.join(policy.experience(pieces, list(scores.split(size)), reference, list(values), BETA))


CRITICLESS = ("rloo", "grpo", "reinforce")


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("advantage", ["gae", *CRITICLESS])
def test_a_constant_added_to_the_scores_changes_no_whitened_advantage(policy: Policy, advantage: str, same_length: bool) -> None:
    """With GAE for lambda 1, where every token's advantage takes on the whole constant."""
    rows = sampled(same_length)
    plain, moved = (made(policy, rows, shift, advantage=advantage, lam=1.0, whiten=True) for shift in (0.0, 7.0))
    torch.testing.assert_close(moved.advantages, plain.advantages, atol=1e-4, rtol=1e-4)
    assert float(plain.advantages[plain.mask].std()) > 0.5


def test_below_lambda_1_a_constant_reaches_a_token_by_its_distance_to_the_end_alike_in_replies_that_end_together(policy: Policy) -> None:
    rows = sampled(same_length=True)
    plain, moved = (made(policy, rows, shift, advantage="gae", lam=0.9, whiten=False) for shift in (0.0, 7.0))
    difference = (moved.advantages - plain.advantages)[rows.mask].view(ROWS, 3)
    torch.testing.assert_close(difference, torch.tensor([7 * 0.81, 7 * 0.9, 7.0]).expand(ROWS, 3), atol=1e-4, rtol=1e-4)


def test_a_replys_reward_is_its_shaped_score_less_beta_times_its_kl_and_rloo_compares_it_with_the_prompts_other_reply(
    policy: Policy,
) -> None:
    rows = sampled()
    found = made(policy, rows, advantage="rloo", whiten=False, missing_end_penalty=0.7)
    kl = ((found.old_logprobs - reference_of(rows)) * rows.mask).sum(dim=1)
    rewards = floats(1, ROWS, dtype=torch.float32) - 0.7 * (~rows.finished) - BETA * kl
    wanted = rewards - rewards.view(-1, 2).flip(1).reshape(-1)
    torch.testing.assert_close(found.advantages, wanted[:, None] * rows.mask, atol=1e-5, rtol=1e-5)
    centred = made(policy, rows, advantage="reinforce", whiten=False, missing_end_penalty=0.7).advantages
    torch.testing.assert_close(centred, (rewards - rewards.mean())[:, None] * rows.mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("advantage", CRITICLESS)
@pytest.mark.parametrize("whiten", [True, False])
def test_the_size_of_pieces_does_not_matter_even_where_they_cut_a_prompts_replies_apart(
    policy: Policy, advantage: str, whiten: bool
) -> None:
    whole, cut = (made(policy, sampled(), size=size, advantage=advantage, whiten=whiten) for size in (ROWS, 1))
    torch.testing.assert_close(cut.advantages, whole.advantages, atol=1e-5, rtol=1e-5)
    assert not whole.returns.any() and not whole.old_values.any()


def test_a_prompts_only_reply_on_a_rank_is_refused(policy: Policy) -> None:
    rows = sampled()
    rows.keys[3, 0] = 77
    with pytest.raises(ValueError, match="single reply on this rank"):
        made(policy, rows, advantage="rloo")


def of_engine(policy: Policy, gap: float, version: int = 0, **ppo: Any) -> tuple[Experience, Rollouts]:
    """Experience from samples of an engine that is `gap` nats off at every token."""
    rows = sampled()
    rows.behaviour = (torch.cat(policy.logprobs([rows])) + gap) * rows.mask
    rows.version = torch.full((ROWS,), version)
    return made(policy, rows, old_logprobs="behaviour", engine_gap_limit=0.01, **ppo), rows


def test_the_engines_log_probs_stand_in_when_they_are_fresh_and_near(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, rows_seen = policy._scored, []
    monkeypatch.setattr(policy, "_scored", lambda pieces, at: rows_seen.append(sum(map(len, pieces))) or forward(pieces, at))
    found, rows = of_engine(policy, 0.005)
    assert torch.equal(found.old_logprobs, rows.behaviour)
    assert rows_seen == [ROWS, 4]  # all rows by this test, and one piece of two to measure the gap
    assert policy.describe()["old_from_behaviour"] == 1.0
    assert policy.describe()["engine_gap_mean"] == pytest.approx(0.005, abs=1e-5)


@pytest.mark.parametrize(("gap", "version", "stale"), [(0.02, 0, 0), (-0.02, 0, 0), (0.005, 1, ROWS), (0.0, -1, ROWS)])
def test_stale_or_far_log_probs_do_not_stand_in(policy: Policy, gap: float, version: int, stale: int) -> None:
    found, rows = of_engine(policy, gap, version)
    torch.testing.assert_close(found.old_logprobs, policy.logprobs([rows])[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.behaviour, rows.behaviour)
    assert policy.describe()["old_from_behaviour"] == 0.0
    assert policy.describe()["stale_replies"] == stale


def test_one_stale_reply_is_enough(policy: Policy) -> None:
    rows = sampled()
    rows.behaviour = torch.cat(policy.logprobs([rows]))
    rows.version[5] = 3
    made(policy, rows, old_logprobs="behaviour")
    assert policy.describe()["stale_replies"] == 1
    assert policy.describe()["old_from_behaviour"] == 0.0


def test_the_trainers_own_log_probs_are_taken_unless_asked_otherwise_and_the_gap_is_measured_all_the_same(policy: Policy) -> None:
    rows = sampled()
    own = torch.cat(policy.logprobs([rows]))
    rows.behaviour = (own + 0.25) * rows.mask
    found = made(policy, rows)
    torch.testing.assert_close(found.old_logprobs, own, atol=1e-5, rtol=1e-5)
    assert policy.describe()["engine_gap_mean"] == pytest.approx(0.25, abs=1e-5)
    assert policy.describe()["old_from_behaviour"] == 0.0


def test_both_estimators_of_the_kl_are_reported_per_token(policy: Policy) -> None:
    rows = sampled()
    found = made(policy, rows)
    places = references.positions_of(rows.mask)
    both = [(float(found.old_logprobs[p]), float(reference_of(rows)[p])) for p in places]
    for name, estimator in (("kl_per_token", references.k1), ("kl_k3_per_token", references.k3)):
        assert policy.describe()[name] == pytest.approx(sum(estimator(*pair) for pair in both) / len(both), rel=1e-4)


def test_weights_that_have_learned_have_no_version_until_they_are_sent(tmp_path: Path) -> None:
    process_group_of_one()
    worker = Policy(smoke(), saved_lm(tmp_path), RankSpec("policy", 0, 1, 1))
    worker.load()
    assert worker.version is None
    worker.weights(version=4)
    assert worker.version == 4
    worker.update([experience(0, ROWS)], [], step=0)
    assert worker.version is None
