"""The roles as the stages see them: typed groups, started on whichever runtime the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from actors.algorithms.running import Moments
from actors.batch import Dialogues, Experience, Prompts, Rollouts
from actors.critic import Critic
from actors.policy import Policy
from actors.reference import Reference
from actors.reward import Reward
from actors.rewards.source import Texts
from actors.rollout import Rollout
from actors.sampling import Sampling
from actors.stream import Endpoint, Route
from actors.weight_sync import WeightUpdate
from actors.weights import Weight
from actors.worker import Worker
from conf.schema import Config
from orchestration.runtime.dispatch import Pieces
from orchestration.runtime.group import Group, RoleRequest, Runtime

CLASSES = {"policy": Policy, "critic": Critic, "reference": Reference, "reward": Reward, "rollout": Rollout}


@dataclass(frozen=True)
class RoleGroup:
    """What all roles have."""

    group: Group

    def trace(self, stage: str, step: int | None) -> Pieces[None]:
        """The calls that follow belong to this step; ranks trace it if `profile` asks for it."""
        return self.group.each(Worker.trace, stage=stage, step=step)


@dataclass(frozen=True)
class PolicyGroup(RoleGroup):
    """The actor."""

    def logprobs(self, rows: Pieces[Rollouts] | Pieces[Dialogues]) -> Pieces[Tensor]:
        return self.group.map(Policy.logprobs, rows)

    def experience(
        self, rollouts: Pieces[Rollouts], scores: Pieces[Tensor], reference: Pieces[Tensor], values: Pieces[Tensor], beta: float,
        so_far: Moments | None = None,
    ) -> Pieces[Experience]:  # fmt: skip
        """`values` is empty without a critic."""
        return self.group.map(Policy.experience, rollouts, scores, reference, values, beta=beta, so_far=so_far)

    def update(
        self, experience: Pieces[Experience], pretraining: Pieces[Dialogues], step: int, lr_scale: float = 1.0
    ) -> Pieces[dict[str, float]]:
        return self.group.each(Policy.update, experience, pretraining, step=step, lr_scale=lr_scale)

    def endpoint(self) -> Pieces[Endpoint]:
        return self.group.each(Policy.endpoint)

    def open_address(self) -> Pieces[str]:
        """Rank 0's, where engines find it for broadcasts."""
        return self.group.each(Policy.open_address)

    def weight_table(self) -> Pieces[dict[str, Weight]]:
        return self.group.each(Policy.weight_table)

    def send_weights(self, version: int, route: Route) -> Pieces[None]:
        """To rollout engines that are told to receive them at the same time."""
        return self.group.each(Policy.send_weights, version=version, route=route)

    def bucket_count(self) -> Pieces[int]:
        return self.group.each(Policy.bucket_count)

    def weights(self, version: int, bucket: int) -> Pieces[WeightUpdate]:
        """One bucket of the weights; all ranks take part, and rank 0 gives it."""
        return self.group.each(Policy.weights, version=version, bucket=bucket)

    def describe(self) -> Pieces[dict[str, float]]:
        return self.group.each(Policy.describe)

    def go_back(self) -> Pieces[int]:
        return self.group.each(Policy.go_back)

    def save_state(self, folder: str) -> Pieces[None]:
        return self.group.each(Policy.save_state, folder=folder)

    def load_state(self, folder: str) -> Pieces[None]:
        return self.group.each(Policy.load_state, folder=folder)

    def export(self, folder: str) -> Pieces[None]:
        return self.group.each(Policy.export, folder=folder)


@dataclass(frozen=True)
class CriticGroup(RoleGroup):
    """The value model."""

    def values(self, rollouts: Pieces[Rollouts]) -> Pieces[Tensor]:
        return self.group.map(Critic.values, rollouts)

    def update(self, experience: Pieces[Experience], step: int) -> Pieces[dict[str, float]]:
        return self.group.each(Critic.update, experience, step=step)

    def save_state(self, folder: str) -> Pieces[None]:
        return self.group.each(Critic.save_state, folder=folder)

    def load_state(self, folder: str) -> Pieces[None]:
        return self.group.each(Critic.load_state, folder=folder)


@dataclass(frozen=True)
class ReferenceGroup(RoleGroup):
    """The frozen SFT model: ranks of its own, or the policy's with their adapters off."""

    def logprobs(self, rows: Pieces[Rollouts] | Pieces[Dialogues], temperature: float) -> Pieces[Tensor]:
        method = Policy.reference_logprobs if self.group.name == "policy" else Reference.logprobs
        return self.group.map(method, rows, temperature=temperature)


@dataclass(frozen=True)
class RewardGroup(RoleGroup):
    """What scores replies: the reward model, or the sources of `ppo.rewards`."""

    def prepare(self, texts: Pieces[Texts]) -> Pieces[None]:
        return self.group.each(Reward.prepare, texts=texts)

    def score(self, rollouts: Pieces[Rollouts], first: bool = True) -> Pieces[Tensor]:
        """`first`: this begins a batch, whose figures `describe` gives."""
        return self.group.map(Reward.score, rollouts, first=first)

    def describe(self) -> Pieces[dict[str, Moments]]:
        return self.group.each(Reward.describe)


@dataclass(frozen=True)
class RolloutGroup(RoleGroup):
    """The engines that sample."""

    def generate(
        self, prompts: Pieces[Prompts], sampling: Sampling, coming: Pieces[Prompts] | None = None, first: bool = True
    ) -> Pieces[Rollouts]:
        """Args:
        coming: what the next calls will ask for; engines may begin with it.
        first: this begins a batch, whose pieces `token_counts` counts.
        """
        return self.group.map(Rollout.generate, prompts, coming or Pieces([], []), sampling=sampling, first=first)

    def endpoint(self) -> Pieces[Endpoint]:
        return self.group.each(Rollout.endpoint)

    def receive_weights(self, version: int, route: Route, table: Pieces[dict[str, Weight]]) -> Pieces[int]:
        return self.group.each(Rollout.receive_weights, version=version, route=route, table=table)

    def token_counts(self) -> Pieces[tuple[int, ...]]:
        """Tokens of each piece of the last batch, rank by rank."""
        return self.group.each(Rollout.token_counts)

    def load_weights(self, update: Pieces[WeightUpdate]) -> Pieces[int]:
        return self.group.each(Rollout.load_weights, update=update)

    def reload(self, checkpoint: str) -> Pieces[None]:
        return self.group.each(Rollout.reload, checkpoint=checkpoint)


_TYPED = {"policy": PolicyGroup, "critic": CriticGroup, "reference": ReferenceGroup, "reward": RewardGroup, "rollout": RolloutGroup}


@dataclass(frozen=True)
class Roles:
    """The groups a stage asked for; asking for another is an error of the stage. `ppo` asks for a critic if the advantages need one."""

    policy: PolicyGroup
    critic: CriticGroup
    reference: ReferenceGroup
    reward: RewardGroup
    rollout: RolloutGroup


def start(runtime: Runtime, config: Config, checkpoints: dict[str, str]) -> Roles:
    """Start the named roles, each from its weights.

    Args:
        checkpoints: role name -> Hugging Face folder. Roles that are not named are not started, nor is the reference of a policy with
            adapters that starts from the same weights.
    """
    shared = config.policy_is_reference() and checkpoints.get("reference", "") == checkpoints.get("policy")
    started = {name: path for name, path in checkpoints.items() if not (shared and name == "reference")}
    requests = [RoleRequest(name, CLASSES[name], path, getattr(config.placement, name)) for name, path in started.items()]
    groups = runtime.start(requests)
    if shared:
        groups = {**groups, "reference": groups["policy"]}
    typed: dict[str, Any] = {name: _TYPED[name](groups[name]) if name in groups else None for name in CLASSES}
    return Roles(**typed)


def connect(config: Config) -> Runtime:
    """The configured runtime."""
    if config.runtime == "local":
        from orchestration.runtime.local import LocalRuntime

        return LocalRuntime(config)
    from orchestration.runtime.cluster import RayRuntime

    return RayRuntime(config)


def rank_counts(config: Config) -> Sequence[int]:
    """Ranks of every role that PPO starts, for cutting batches that all can share evenly."""
    return [getattr(config.placement, name).ranks for name in config.roles_of_ppo()]
