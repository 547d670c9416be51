"""`{"instruction": "…", "input": "…", "output": "…"}`, or Self-Instruct's `{"instruction": "…", "instances": [{"input", "output"}]}`.

Each becomes a dialogue of two turns: the user gives the instruction, its input below it, and the assistant the output.
"""

from __future__ import annotations

from typing import Any

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.formats.sample import Sample, name_in, text_in


def sample(row: dict[str, Any], identifier: str) -> Sample:
    """One dialogue for each instance; all of one row are one conversation."""
    name, instruction = name_in(row, identifier), text_in(row, "instruction")
    instances = row.get("instances", [row])
    if not isinstance(instances, list) or not instances:
        raise ValueError("'instances' is not a list of inputs and outputs")
    found = []
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, dict):
            raise ValueError(f"instance {number} is not an object but {type(instance).__name__}")
        given = text_in(instance, "input", empty=True) if instance.get("input") is not None else ""
        asked = f"{instruction}\n\n{given}" if given else instruction
        messages = (Message("user", asked), Message("assistant", text_in(instance, "output")))
        found.append(Dialogue(name if len(instances) == 1 else f"{name}.{number}", messages))
    return Sample(name, demonstrations=tuple(found))
