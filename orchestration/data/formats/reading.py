"""From a row to a sample, by the name of its format."""

from __future__ import annotations

from conf.sources import Part
from orchestration.data.formats import instructions, messages, plain, rankings, taskmaster, transcripts
from orchestration.data.formats.sample import Sample
from orchestration.data.rows import BadRow, Row

UNEXPECTED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What a row of the wrong form may make a reader raise."""


def sample_of(row: Row, part: Part, identifier: str, tool_response_chars: int) -> Sample | BadRow:
    """What the row gives, or why it gives nothing.

    Args:
        identifier: names the row where it has no name of its own.
    """
    try:
        return _sample(row, part, identifier, tool_response_chars)
    except UNEXPECTED as cause:
        reason = str(cause) if type(cause) is ValueError else f"not of the form {part.columns or part.format} ({cause!r:.200})"
        return BadRow(row.file, row.line, reason)


def _sample(row: Row, part: Part, identifier: str, tool_response_chars: int) -> Sample:
    match part.columns or part.format:
        case "messages":
            return messages.sample(row.value, identifier)
        case "hh":
            return transcripts.sample(row.value, identifier, part.best_as_demonstration)
        case "instructions":
            return instructions.sample(row.value, identifier)
        case "rankings":
            return rankings.sample(row.value, identifier, part.best_as_demonstration)
        case "taskmaster":
            return taskmaster.sample(row.value, identifier, tool_response_chars)
        case "text":
            return plain.sample(row.value, identifier)
        case name:
            raise AssertionError(f"no reader for the format {name}")
