"""Scores by a Python function that the user names by its import path.

    def brief(conversations, replies):
        return [-len(reply) / 100 for reply in replies]

`conversations` is a list of lists of messages, up to where the reply begins; `replies` a list of texts of the same length. The function
is imported on every reward rank, so it need not be picklable; its folder is put last on the import path, where nothing in it can hide
chatray's own packages.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import Tensor

from actors.rewards.source import RewardError, Rows, checked
from conf.rewards import FunctionReward


def find(settings: FunctionReward) -> Callable[..., Any]:
    """The function.

    Raises:
        RewardError: it cannot be imported; says why, and where it was looked for.
    """
    who = f"ppo.rewards: {settings.function}"
    if settings.folder and settings.folder not in sys.path:
        sys.path.append(settings.folder)
    module, _, name = settings.function.partition(":")
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except AttributeError as cause:
        raise RewardError(f"{who}: {cause}") from cause
    except (Exception, SystemExit) as cause:
        raise RewardError(
            f"{who}: cannot be imported ({_described(cause)}); it was looked for in what is installed and in {settings.folder}: set "
            "`folder` of this source, and have it there on every machine"
        ) from cause
    if not callable(found):
        raise RewardError(f"{who}: is no function, but {type(found).__name__}")
    return found


class FunctionSource:
    """One function."""

    def __init__(self, settings: FunctionReward) -> None:
        self.settings, self.function = settings, find(settings)

    def score(self, rows: Rows) -> Tensor:
        who = f"ppo.rewards: {self.settings.function}"
        try:
            values = self.function(rows.contexts, list(rows.replies))
        except (Exception, SystemExit) as cause:
            raise RewardError(f"{who} raised {_described(cause)}; the same command goes on from the last commit") from cause
        # arrays and tensors of one dimension are as good as lists
        return checked(values.tolist() if hasattr(values, "tolist") else values, len(rows), who)


def _described(cause: BaseException) -> str:
    """The error and the line it came from."""
    frames = traceback.extract_tb(cause.__traceback__)
    return f"{type(cause).__name__}: {cause} in {frames[-1].filename}:{frames[-1].lineno}"
