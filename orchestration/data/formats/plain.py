"""Plain text: `{"text": "…"}`, a JSON string, or a paragraph of a `.txt` file."""

from __future__ import annotations

from typing import Any

from orchestration.data.formats.sample import Sample, checked, text_in


def sample(row: dict[str, Any] | str, identifier: str) -> Sample:
    return Sample(identifier, text=checked(row, "the text") if isinstance(row, str) else text_in(row, "text"))
