"""Rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator

from orchestration.data.rows import Row
from orchestration.errors import RequestError


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Every row of one split; `file` is the data set's name.

    Raises:
        RequestError: it cannot be loaded or breaks off; names data set, split and cause.
    """
    import datasets

    number = 0
    try:
        for number, value in enumerate(datasets.load_dataset(name, split=split, streaming=True), start=1):
            yield Row(name, number, dict(value))
    except Exception as cause:  # the hub, the network and the files behind it fail in many ways
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
        raise RequestError(
            f"data: the data set {name!r}, split {split!r}, cannot be read beyond row {number} ({first}); check name and split in "
            "data.mix, and that the hub can be reached"
        ) from cause
