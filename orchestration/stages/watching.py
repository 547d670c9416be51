"""What watches over a run of PPO: self-checks, illnesses, and the curve of the held-out judge.

The rules are in `checks.py` and `diagnostics.py`; here is what has been seen so far, what is printed (each thing once), and what goes into
metrics.jsonl and summary.json. All of it follows from the rows of metrics.jsonl, so a run that goes on knows what it knew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestration import checks, diagnostics
from orchestration.checks import Finding
from orchestration.errors import RunError
from orchestration.roles import rank_counts
from orchestration.run_directory import read_records
from orchestration.stages.context import StageContext


class Watch:
    """The memory of one run."""

    def __init__(self, context: StageContext) -> None:
        self.context, self.config = context, context.config
        self.rows: list[dict[str, Any]] = []
        self.curve: list[dict[str, float]] = []
        self.checked: dict[str, dict[str, Any]] = {}
        self.warned: dict[str, dict[str, Any]] = {}
        self.ill: list[str] = []
        self.said = False
        self.go_back(0)

    def go_back(self, step: int) -> None:
        """Know what metrics.jsonl says of the first `step` steps, and nothing else."""
        self.rows, self.curve, self.checked, self.warned, self.ill = [], [], {}, {}, []
        self.updates = 0
        for row in read_records(self.context.directory.metrics):
            if row["step"] <= step:
                self._remember(row)

    def _remember(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        for name, result in row.get("checks", {}).items():
            self._keep_worst(name, result)
        self.curve += [row["judge"]] if "judge" in row else []
        self.ill = row.get("warnings", [])
        for name in self.ill:
            known = self.warned.setdefault(name, {"first": row["step"], "steps": 0})
            known |= {"last": row["step"], "steps": known["steps"] + 1}

    def _keep_worst(self, name: str, result: dict[str, Any]) -> None:
        known = self.checked.get(name)
        if known is None or abs(result["seen"]) > abs(known["seen"]) or result["seen"] != result["seen"]:
            self.checked[name] = result

    def check(self, findings: Sequence[Finding]) -> dict[str, Any]:
        """Judge them; the results are for this step's row.

        Raises:
            RunError: one failed, and `checks` is strict.
        """
        failed = [finding for finding in findings if not finding.passed]
        if failed and self.config.checks == "strict":
            sentences = "\n  ".join(finding.sentence() for finding in failed)
            raise RunError(f"{sentences}\n  what was committed stays in {self.context.directory.path}; checks=warn goes on all the same")
        for finding in failed:
            if self.checked.get(finding.name, {}).get("passed", True):  # once for each check
                self.context.metrics.say(f"  [yellow]{finding.sentence()}[/yellow]")
        for finding in findings:
            self._keep_worst(finding.name, finding.as_dict())
        return {finding.name: finding.as_dict() for finding in findings}

    def sampled(self, step: int, figures: dict[str, float], zero: float | None) -> dict[str, Any]:
        """Checks of a step's samples.

        Args:
            step: updates made before; the version of the policy's weights.
            zero: the demonstrations' mean score, where it was measured.
        """
        if self.config.checks == "off":
            return {}
        dtype = self.config.dtype()
        first = checks.before_learning(figures, dtype) if step == 0 else []
        measured = [checks.zero_point(zero, dtype)] if zero is not None else []
        return self.check([*checks.every_step(figures, dtype, self.sampled_by(step), step), *first, *measured])

    def sampled_by(self, step: int) -> int:
        """Version of the weights that a step's batch is sampled by. The last weights are measured by samples of their own."""
        ppo = self.config.ppo
        return step if step == ppo.steps else max(step - ppo.staleness, 0)

    def updated(self, figures: dict[str, float]) -> dict[str, Any]:
        """Checks of the first update since the run began, went on, or went back; of its ratios where the old log-probs are the trainer's
        own: those of an engine differ by its gap, which has a check."""
        self.updates += 1
        if self.config.checks == "off" or self.updates > 1:
            return {}
        own = not figures.get("old_from_behaviour")
        found = self.check(checks.first_update(figures, self.config.dtype(), self._own_micro_batches())) if own else {}
        passed = [f"{name} {r['seen']:.2g}" for name, r in self.checked.items() if r["passed"]]
        if not self.said:
            self.context.metrics.say(f"  checks passed: {len(passed)} of {len(self.checked)} ({', '.join(passed)})")
        self.said = True
        return found

    def _own_micro_batches(self) -> bool:
        """Whether a rank's share is computed in the same passes before the update and in it: the plan follows from the rows alone."""
        ppo, ranks = self.config.ppo, self.config.placement.policy.ranks
        one_piece = math.lcm(*rank_counts(self.config)) == ranks and ppo.batch <= ranks * self.config.engine.micro_batch
        return ppo.minibatches == 1 and (one_piece or ppo.old_logprobs == "trainer")

    def recorded(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of a finished step with the names of what is ill; says what began and what ended."""
        budget = {"kl_of_budget": row["kl"] / self.config.ppo.kl.budget} if "kl" in row else {}
        found = diagnostics.illnesses([*self.rows, row | budget], [*self.curve, *([row["judge"]] if "judge" in row else [])])
        news = diagnostics.change(self.ill, found)
        for name, sentence in news.begun.items():
            again = "again: " if name in self.warned else ""
            self.context.metrics.say(f"  [yellow]step {row['step']}: {again}{sentence}[/yellow]")
        for name in news.ended:
            self.context.metrics.say(f"  step {row['step']}: {name} is over")
        row = row | budget | ({"warnings": list(found)} if found else {})
        self._remember(row)
        return row

    def result(self) -> dict[str, Any]:
        """For summary.json: checks at their worst, warnings with their steps, and the judge's curve."""
        found: dict[str, Any] = {"checks": self.checked, "warnings": self.warned}
        return found | ({"curve": self.curve} if self.curve else {})
