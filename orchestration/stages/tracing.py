"""Traces of chosen roles and steps of PPO (`profile`): tells ranks which step their calls belong to. They write the files themselves."""

from __future__ import annotations

from orchestration.roles import Roles
from orchestration.stages.context import StageContext


class Tracing:
    """Nothing is sent for steps that are not asked for."""

    def __init__(self, context: StageContext, roles: Roles) -> None:
        self.stage, self.runtime, self.profile = context.name, context.runtime, context.config.profile
        self.groups = {name: group for name in self.profile.roles if name != "train" and (group := getattr(roles, name)) is not None}
        self.on = False

    def turn_to(self, step: int | None) -> None:
        """The calls that follow belong to this step, as numbered in metrics.jsonl; None: to none."""
        wanted = step is not None and step in self.profile.steps
        if wanted or self.on:
            told = [group.trace(self.stage, step) for group in self.groups.values()]
            self.runtime.wait(*told, what="ranks to take note of a step to be traced")
        self.on = wanted
