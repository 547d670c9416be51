"""One suite for both runtimes: whatever a stage may ask of a runtime, both give, and on replayed rollouts they give the same numbers."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from stand_ins import DIARY, StandIn
from tiny_models import save_tiny_models

from actors.batch import Experience, Prompts, Rollouts
from actors.models import load_causal_lm
from actors.policy import Policy
from actors.rewards.source import Texts
from actors.rollout import Rollout
from actors.sampling import Sampling
from actors.weight_sync import unpack
from conf.schema import Config
from orchestration import config as configuration
from orchestration import roles
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.scoring import ReplyEncoder
from orchestration.data.world import scenarios
from orchestration.errors import RunError
from orchestration.roles import PolicyGroup, Roles, RolloutGroup
from orchestration.runtime.cluster import RayRuntime
from orchestration.runtime.dispatch import Pieces, cut
from orchestration.runtime.group import RoleRequest, Runtime
from orchestration.stages.rewarding import moments_of_scores
from orchestration.stages.syncing import WeightSync

pytestmark = pytest.mark.ray

ROWS = 8
STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model and reward model, with their tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder, settings("local", folder))
    return folder


def settings(runtime: str, folder: Path, *more: str) -> Config:
    words = ["experiment=smoke", f"runtime={runtime}", f"run_dir={folder}", "ppo.batch=8", "engine.micro_batch=4", "ppo.lr=1e-3", *more]
    return configuration.load(words)


@pytest.fixture(scope="module", params=["local", "ray"])
def runtime(request: pytest.FixtureRequest, models: Path) -> Iterator[Runtime]:
    found = roles.connect(settings(request.param, models))
    yield found
    found.close()


@pytest.fixture(scope="module")
def started(runtime: Runtime, models: Path) -> Iterator[Roles]:
    yield start(runtime, models)
    runtime.stop()


def start(runtime: Runtime, models: Path) -> Roles:
    lm, rm = str(models / "lm"), str(models / "rm")
    weights = {"policy": lm, "critic": rm, "reference": lm, "reward": rm, "rollout": lm}
    return roles.start(runtime, runtime.config, weights)  # type: ignore[attr-defined]


def prompts(models: Path) -> Prompts:
    from orchestration.data.chat import load_tokenizer

    chat = Chat(load_tokenizer(str(models / "lm"), "test"))
    return chat.prompts(scenarios.prompts(ROWS, 3, settings("local", models).data.flaws, judging=False), [(n, 0) for n in range(ROWS)])


def generated(runtime: Runtime, started: Roles, models: Path) -> Pieces[Rollouts]:
    pieces = runtime.put(cut(prompts(models), 1, 4))
    return started.rollout.generate(pieces, Sampling(1.0, 8, 0, 0))


def replayed(models: Path) -> list[Rollouts]:
    """Rollouts that are the same in every runtime: sampled here, once."""
    from actors.rollout_transformers import TransformersEngine

    lm = load_causal_lm(str(models / "lm"))
    engine = TransformersEngine(lm, int(lm.generation_config.eos_token_id), torch.device("cpu"))
    return [engine.generate(piece, Sampling(1.0, 8, 0, 0)) for piece in cut(prompts(models), 1, 4)]


def test_pieces_keep_their_order_and_rows_through_every_role(runtime: Runtime, started: Roles, models: Path) -> None:
    rollouts = generated(runtime, started, models)
    fetched = runtime.get(rollouts, "rollouts")
    scores = runtime.get(started.reward.score(rollouts), "scores")
    reference = runtime.get(started.reference.logprobs(rollouts, 1.0), "log-probs")
    values = runtime.get(started.critic.values(rollouts), "values")
    assert [len(piece) for piece in fetched] == [4, 4]
    assert Rollouts.join(fetched).keys.tolist() == [[n, 0] for n in range(ROWS)]
    assert [score.shape for score in scores] == [(4,), (4,)]
    for piece, r, v in zip(fetched, reference, values, strict=True):
        assert r.shape == v.shape == piece.tokens.shape


def test_the_rewards_figures_are_those_of_its_scores(runtime: Runtime, started: Roles, models: Path) -> None:
    scores = torch.cat(runtime.get(started.reward.score(runtime.put(replayed(models))), "scores"))
    found, by_source = moments_of_scores(runtime, started)
    assert (found.count, found.mean) == (ROWS, pytest.approx(float(scores.mean()), abs=1e-6))
    assert found.std() == pytest.approx(float(scores.std(unbiased=False)), abs=1e-6)
    assert by_source == {"score_model": pytest.approx(found.mean)}


def test_what_a_reward_is_told_reaches_its_ranks_and_what_it_refuses_ends_the_run(runtime: Runtime, started: Roles, models: Path) -> None:
    rollouts = runtime.put(replayed(models))
    before = torch.cat(runtime.get(started.reward.score(rollouts), "scores"))
    chat = Chat(load_tokenizer(str(models / "lm"), "test"))
    contexts = [c.as_list() for c in scenarios.prompts(ROWS, 3, settings("local", models).data.flaws, judging=False)]

    def tell(longest: int) -> None:
        texts = Texts(contexts, chat, {"model": ReplyEncoder("model", chat, longest, False)} if longest else {})
        runtime.wait(started.reward.prepare(runtime.put([texts])), what="texts")

    tell(longest=2)
    with pytest.raises(RunError, match="reward rank 0 failed in score: .*a reply alone is .* tokens, and it takes 2"):
        runtime.wait(started.reward.score(rollouts), what="scores")
    tell(longest=0)
    assert torch.equal(torch.cat(runtime.get(started.reward.score(rollouts), "scores")), before)


def test_samples_equal_those_drawn_without_any_runtime(runtime: Runtime, started: Roles, models: Path) -> None:
    fetched = Rollouts.join(runtime.get(generated(runtime, started, models), "rollouts"))
    expected = Rollouts.join(replayed(models))
    assert torch.equal(fetched.tokens, expected.tokens)
    assert torch.equal(fetched.mask, expected.mask)


def test_at_the_start_the_policy_equals_the_reference_and_the_engine(runtime: Runtime, started: Roles, models: Path) -> None:
    rollouts = generated(runtime, started, models)
    fetched = runtime.get(rollouts, "rollouts")
    policy = runtime.get(started.policy.logprobs(rollouts), "policy")
    reference = runtime.get(started.reference.logprobs(rollouts, 1.0), "reference")
    for piece, p, r in zip(fetched, policy, reference, strict=True):
        assert torch.equal(p, r)
        torch.testing.assert_close(p, piece.behaviour, atol=1e-4, rtol=0)


def three_steps(runtime: Runtime, started: Roles, models: Path) -> tuple[list[dict[str, float]], torch.Tensor]:
    """PPO's learning half on the same rollouts every time."""
    found = []
    rollouts = runtime.put(replayed(models))
    for step in range(STEPS):
        scores = started.reward.score(rollouts)
        reference = started.reference.logprobs(rollouts, 1.0)
        values = started.critic.values(rollouts)
        experience = started.policy.experience(rollouts, scores, reference, values, 0.05)
        updates = started.policy.update(experience, runtime.put([]), step), started.critic.update(experience, step)
        learned = runtime.get(updates[0], "policy")[0] | runtime.get(updates[1], "critic")[0]
        found.append(learned | runtime.get(started.policy.describe(), "samples")[0])
    weights = runtime.get(started.policy.weights(STEPS, 0), "weights")[0]
    return found, torch.cat([tensor.flatten() for tensor in unpack(weights).values()])


SEEN: dict[str, tuple[list[dict[str, float]], torch.Tensor]] = {}


def test_three_ppo_steps_on_replayed_rollouts_agree_between_runtimes(runtime: Runtime, started: Roles, models: Path) -> None:
    figures, weights = three_steps(runtime, started, models)
    assert figures[0]["kl"] == 0 and figures[0]["first_kl"] == 0 and figures[0]["first_clip_share"] == 0
    assert figures[-1]["kl"] != 0, "three steps must have changed the policy"
    SEEN[type(runtime).__name__] = (figures, weights)
    if len(SEEN) == 2:
        (one, these), (other, those) = SEEN.values()
        torch.testing.assert_close(these, those, atol=1e-6, rtol=1e-5)
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), name


def test_new_weights_change_what_the_engines_sample(runtime: Runtime, started: Roles, models: Path) -> None:
    before = Rollouts.join(runtime.get(generated(runtime, started, models), "rollouts"))
    runtime.wait(started.rollout.load_weights(started.policy.weights(7, 0)), what="weights")
    after_pieces = generated(runtime, started, models)
    after = Rollouts.join(runtime.get(after_pieces, "rollouts"))
    assert before.version.unique().tolist() == [0] and after.version.unique().tolist() == [7]
    policy = torch.cat([p.sum(dim=1) for p in runtime.get(started.policy.logprobs(after_pieces), "policy")])
    torch.testing.assert_close(after.behaviour.sum(dim=1), policy, atol=1e-3, rtol=0)
    assert not torch.equal(before.behaviour[:, : after.behaviour.shape[1]], after.behaviour[:, : before.behaviour.shape[1]])


@pytest.mark.parametrize("way", ["auto", "object_store", "shared_memory", "collective"])
def test_weights_reach_the_engines_on_every_way_with_their_version(runtime: Runtime, started: Roles, models: Path, way: str) -> None:
    local = type(runtime).__name__ == "LocalRuntime"
    version = 10 + ["auto", "object_store", "shared_memory", "collective"].index(way)
    sync = WeightSync(runtime, settings("local" if local else "ray", models, f"placement.weight_sync={way}"), started)
    started.rollout.group.each(Rollout.reload, checkpoint=str(models / "lm"))  # whatever came before is forgotten
    sent = sync.send(version)
    assert sync.way == ("object_store" if local else {"auto": "shared_memory", "collective": "gloo"}.get(way, way))
    assert sent == sum(weight.bytes() for weight in runtime.get(started.policy.weight_table(), "names")[0].values())
    pieces = generated(runtime, started, models)
    rollouts = Rollouts.join(runtime.get(pieces, "rollouts"))
    assert rollouts.version.unique().tolist() == [version]
    policy = torch.cat([p.sum(dim=1) for p in runtime.get(started.policy.logprobs(pieces), "policy")])
    torch.testing.assert_close(rollouts.behaviour.sum(dim=1), policy, atol=1e-3, rtol=0)


class Faulty(Rollout):
    """Stops in the middle of version 2, and dies in the middle of version 3."""

    how: signal.Signals | None = None

    def receive_weights(self, version: int, route: Any, table: Any) -> int:
        self.how = {2: signal.SIGSTOP, 3: signal.SIGKILL}.get(version)
        (Path(self.config.run_dir) / "pid").write_text(str(os.getpid()))
        return super().receive_weights(version, route, table)

    def _places(self) -> dict[str, torch.Tensor]:
        if self.how is not None:  # policy and engine have met, and nothing is read yet
            # to this thread: sent to the process, another thread may take it, and this one go on until that is scheduled
            signal.pthread_kill(threading.get_ident(), self.how)
        return super()._places()


def test_an_engine_that_stops_or_dies_amid_a_sync_ends_the_run_with_its_name(runtime: Runtime, models: Path, tmp_path: Path) -> None:
    from ray import cloudpickle

    if type(runtime).__name__ == "LocalRuntime":
        return  # one process: there is nobody left to say it
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = settings("ray", models, "deadlines.sync=5", "placement.policy.threads=1", "placement.rollout.threads=1")
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    beside = RayRuntime(config)
    try:
        lm = str(models / "lm")
        asked = (("policy", Policy), ("rollout", Faulty))
        groups = beside.start([RoleRequest(name, kind, lm, getattr(config.placement, name)) for name, kind in asked])
        two = Roles(PolicyGroup(groups["policy"]), None, None, None, RolloutGroup(groups["rollout"]))  # type: ignore[arg-type]
        sync = WeightSync(beside, config, two)
        sync.send(1)
        with pytest.raises(RunError) as stopped:
            sync.send(2)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
        assert "policy rank 0 failed in send_weights: WeightSyncError: waited 5 s (deadlines.sync) for rollout rank 0" in str(stopped.value)
        assert "rollout rank 0: does not answer (stopped" in str(stopped.value)
        with pytest.raises(RunError, match="rollout rank 0 died in receive_weights"):
            sync.send(3)
    finally:
        beside.stop()


def test_a_commit_brings_policy_and_critic_back(runtime: Runtime, started: Roles, models: Path, tmp_path: Path) -> None:
    saved = (started.policy.save_state(str(tmp_path / "policy")), started.critic.save_state(str(tmp_path / "critic")))
    runtime.wait(*saved, what="commit")
    first, weights = three_steps(runtime, started, models)
    loaded = (started.policy.load_state(str(tmp_path / "policy")), started.critic.load_state(str(tmp_path / "critic")))
    runtime.wait(*loaded, what="resume")
    second, again = three_steps(runtime, started, models)
    assert torch.equal(weights, again), "optimizer state or weights were not restored"
    assert first[-1]["policy_loss"] == pytest.approx(second[-1]["policy_loss"], abs=1e-7)


def test_experience_is_whole(runtime: Runtime, started: Roles, models: Path) -> None:
    rollouts = generated(runtime, started, models)
    scores, values = started.reward.score(rollouts), started.critic.values(rollouts)
    reference = started.reference.logprobs(rollouts, 1.0)
    experience = Experience.join(runtime.get(started.policy.experience(rollouts, scores, reference, values, 0.05), "experience"))
    assert {f.name for f in dataclasses.fields(experience)} >= {"advantages", "returns"}
    chosen = experience.advantages[experience.mask]
    assert chosen.mean().abs() < 1e-5 and (chosen.var(unbiased=False) - 1).abs() < 1e-3
    assert not experience.advantages[~experience.mask].any()


def test_a_policy_with_adapters_answers_for_the_reference(runtime: Runtime, started: Roles, models: Path) -> None:
    config = settings("local" if type(runtime).__name__ == "LocalRuntime" else "ray", models, "lora.rank=4", "placement.reference.cpus=99")
    beside = roles.connect(config)  # on the same cluster; the reference's 99 CPUs are not asked for
    try:
        lm = str(models / "lm")
        adapted = roles.start(beside, config, {"policy": lm, "reference": lm})
        assert adapted.reference.group is adapted.policy.group
        rollouts = runtime.put(replayed(models))
        scores, values = started.reward.score(rollouts), started.critic.values(rollouts)
        for step in range(2):
            reference = adapted.reference.logprobs(rollouts, 1.0)
            experience = adapted.policy.experience(rollouts, scores, reference, values, 0.05)
            beside.wait(adapted.policy.update(experience, beside.put([]), step), what="update")
            assert (beside.get(adapted.policy.describe(), "samples")[0]["kl"] == 0) == (step == 0)
        wanted = runtime.get(started.reference.logprobs(rollouts, 1.0), "reference")
        for one, other in zip(beside.get(adapted.reference.logprobs(rollouts, 1.0), "adapters off"), wanted, strict=True):
            assert torch.equal(one, other)
        assert roles.rank_counts(config) == [1, 1, 1, 1]
    finally:
        beside.stop()


def placed_to_sleep(runtime: Runtime, models: Path, folder: Path) -> Config:
    name = "local" if type(runtime).__name__ == "LocalRuntime" else "ray"
    return dataclasses.replace(settings(name, models, "placement.sleep=true", "placement.share=true"), run_dir=str(folder))


def test_roles_that_share_devices_work_in_turns_and_never_are_two_awake(runtime: Runtime, tmp_path: Path) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(stand_ins)  # Ray's workers do not have the tests on their path
    config = placed_to_sleep(runtime, tmp_path, tmp_path)
    beside = roles.connect(config)
    try:
        names = ("policy", "critic", "reward")
        groups = beside.start([RoleRequest(n, StandIn, "", getattr(config.placement, n)) for n in names])  # type: ignore[arg-type]
        pieces = beside.put([1, 2])
        once = groups["policy"].map(StandIn.add, pieces)
        twice = groups["critic"].map(StandIn.add, groups["critic"].map(StandIn.add, once, amount=10), amount=100)
        again = groups["policy"].map(StandIn.add, twice, amount=1000)
        assert beside.get(again, "sums") == [1112, 1113]
        beside.get(groups["reward"].map(StandIn.add, again), "sums")
        beside.get(groups["reward"].map(StandIn.add, again), "sums")
    finally:
        beside.stop()
    lines = [line.split() for line in (tmp_path / DIARY).read_text().splitlines()]
    loaded = [f"{name} {word}" for name in names for word in ("load", "sleep")]
    turns = ["policy wake", "policy add", "policy sleep", "critic wake", "critic add", "critic add", "critic sleep", "policy wake",
             "policy add", "policy sleep", "reward wake", "reward add", "reward add"]  # fmt: skip
    assert [f"{role} {word}" for role, _, word in lines] == loaded + turns


def test_ppo_in_turns_gives_the_numbers_of_ppo_at_once(runtime: Runtime, models: Path, tmp_path: Path) -> None:
    found = []
    turns = placed_to_sleep(runtime, models, tmp_path)
    for config in (turns, settings(turns.runtime, models)):
        beside = roles.connect(config)
        try:
            found.append(three_steps(beside, start(beside, models), models))
        finally:
            beside.stop()
    (asleep, these), (awake, those) = found
    assert torch.equal(these, those)
    assert asleep == awake
