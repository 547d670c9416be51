"""What happens when the KL to the reference is above its budget (`ppo.guard`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.ppo import PPO
from orchestration.run_directory import ResumePoint, StageDirectory


@dataclass
class KLGuard:
    """Decides; the loop acts."""

    ppo: PPO
    rollbacks: list[dict[str, float]] = field(default_factory=list)
    """Of this run so far: `from` and `to` which step, the `kl` that was seen, the `beta` after it."""

    def exceeded(self, kl: float) -> bool:
        """KL per reply, nats; one that is not a number is above any budget."""
        return self.ppo.guard.action != "off" and not kl <= self.ppo.kl.budget

    def needs_start(self, step: int) -> bool:
        """Whether the first weights must be committed, for there is nothing else yet to go back to."""
        return self.ppo.guard.action == "rollback" and step == 0 and not self.rollbacks

    def point_to_go_back_to(self, directory: StageDirectory) -> ResumePoint | None:
        """The last commit, which was within the budget as all are; None: the run is to stop."""
        if self.ppo.guard.action != "rollback" or len(self.rollbacks) >= self.ppo.guard.times:
            return None
        return directory.last()

    def lr_scale(self) -> float:
        """Of the policy's learning rate, after the rollbacks so far."""
        return self.ppo.guard.lr_factor ** len(self.rollbacks)

    def last_word(self, step: int, kl: float) -> str:
        """For the terminal, when the run stops."""
        return f"step {step}: KL {kl:.3g} is above ppo.kl.budget={self.ppo.kl.budget:g}; stopped with the weights before these"

    def sentence(self) -> str:
        """The last rollback, for the terminal."""
        last = self.rollbacks[-1]
        return (
            f"step {last['from']}: KL {last['kl']:.3g} is above ppo.kl.budget={self.ppo.kl.budget:g}; back to the commit of step "
            f"{last['to']}, with beta {last['beta']:.3g}, {self.lr_scale():g} of ppo.lr ({len(self.rollbacks)} of {self.ppo.guard.times})"
        )
