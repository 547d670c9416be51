"""What fits where, before a GPU is spent: `plan.plan` answers, `remedies` says what to change, `show` prints it."""

from orchestration.planner.plan import Plan, plan
from orchestration.planner.remedies import with_remedies

__all__ = ["Plan", "plan", "with_remedies"]
