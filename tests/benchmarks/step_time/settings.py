"""What is compared: settings of one PPO iteration that every contestant runs alike, and ours in chatray's own words.

fixed    3.7M parameters, random weights; every reply has the full length, and no token ends it
natural  2.0M parameters, trained on coffee orders (Taskmaster-4); most replies end long before the limit
smoke    seconds, to see that the harness works
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROLES = ("policy", "critic", "reference", "reward", "rollout")


@dataclass(frozen=True)
class Setting:
    """One PPO iteration."""

    name: str
    scale: tuple[str, ...] = ("scale=tiny",)
    """The policy's shape, where it is not trained before."""
    prompts: int = 64
    """In every iteration the same ones, one reply each."""
    prompt_tokens: int = 48
    """`fixed`: of every prompt. `natural`: of the longest."""
    limit: int = 64
    """Tokens of a reply at most."""
    epochs: int = 4
    minibatches: int = 4
    ends: bool = False
    """Whether a token ends a reply."""
    lr: float = 1e-4
    """Of policy and critic, constant."""
    beta: float = 0.05
    """Weight of the KL penalty per token."""
    micro_batch: int = 16
    """Ours and the bare loop's; TRL's is the minibatch."""
    runtime: str = "ray"
    threads: int = 2
    """Of TRL's process and the bare loop's; ours has those of its placement."""
    placement: tuple[str, ...] = ("placement=two_cores",)
    """Of ours: where its ranks run, and how their models are held."""
    device: str = "cpu"
    """Of TRL and the bare loop; ours takes what its placement reserves."""
    reward_scale: str | None = None
    """Shape of reward model and critic; None: the policy's."""

    def save(self, folder: Path) -> None:
        (folder / "setting.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


SETTINGS = {
    "fixed": Setting("fixed", ("scale=tiny", "scale.width=256", "scale.heads=8", "scale.feed_forward=768")),
    "natural": Setting("natural", prompt_tokens=128, ends=True, micro_batch=8),
    "smoke": Setting(
        "smoke", ("scale=micro", "scale.layers=1", "scale.width=32", "scale.heads=2", "scale.feed_forward=32"), prompts=8,
        prompt_tokens=16, limit=4, epochs=2, minibatches=2, runtime="local", threads=1,
        placement=("placement=cpu", *(f"placement.{role}.threads=1" for role in ROLES)),
    ),
}  # fmt: skip


def load(folder: Path) -> Setting:
    """The setting that a folder was prepared for."""
    found = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    return replace(Setting(**found), scale=tuple(found["scale"]), placement=tuple(found["placement"]))


def words(setting: Setting, folder: Path, run_dir: Path, dtype: str) -> list[str]:
    """The command line of `chatray run` for this setting, without its prompts."""
    return [
        "stage=ppo", f"runtime={setting.runtime}", f"run_dir={run_dir}", f"policy_checkpoint={folder}/lm", f"reward_checkpoint={folder}/rm",
        f"model.dtype={dtype}", f"engine.micro_batch={setting.micro_batch}", "logging.progress=false", "commit.every=1000000",
        "ppo.steps=1000000", f"ppo.batch={setting.prompts}", f"ppo.epochs={setting.epochs}", f"ppo.minibatches={setting.minibatches}",
        f"ppo.lr={setting.lr}", f"ppo.critic_lr={setting.lr}", "ppo.warmup=0", f"ppo.kl.beta={setting.beta}", "ppo.kl.controller=fixed",
        "ppo.guard.action=off", "ppo.judge.every=0",
        "ppo.old_logprobs=behaviour", f"ppo.missing_end_penalty={1.0 if setting.ends else 0.0}", f"ppo.max_new_tokens={setting.limit}",
        "ppo.max_grad_norm=1e9", *setting.placement,
    ]  # fmt: skip
