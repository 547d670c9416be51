"""What was measured, as tables: seconds and ratios, phases, learning, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import paired
from tests.benchmarks.report import table
from tests.benchmarks.step_time import pairs

NAMES = {"ours": "chatray", "theirs": "TRL 1.12.0", "bare": "bare loop"}
COMPARED = (
    ("ours", "theirs"), ("ours-bf16", "theirs-bf16"), ("ours-bf16", "theirs"), ("ours", "bare"), ("ours-bf16", "bare-bf16"),
    ("theirs", "bare"),
)  # fmt: skip
TARGETS = {
    ("natural", "ours", "theirs"): "at most 0.40", ("natural", "ours-bf16", "theirs-bf16"): "at most 0.40",
    ("natural", "ours-bf16", "theirs"): "at most 0.25", ("fixed", "ours", "theirs"): "interval below 1",
    ("fixed", "ours-bf16", "theirs-bf16"): "interval below 1", ("fixed", "ours-bf16", "theirs"): "at most 0.60",
    ("fixed", "ours", "bare"): "at most 1.15", ("natural", "ours", "bare"): "at most 1.15",
}  # fmt: skip
EDGE = 3
"""Rounds at each end of a session that its learning is read from."""
MIB = 1 << 20


def named(arm: str) -> str:
    kind, _, dtype = arm.partition("-")
    return f"{NAMES[kind]}, {dtype or 'fp32'}"


def ratios(out: Path, settings: Sequence[str]) -> str:
    """Seconds of one iteration, and the ratio of every two that took part in the same rounds."""
    rows = []
    for setting in settings:
        for ours, theirs in COMPARED:
            lines = pairs.read(out / "rounds.jsonl", setting, [ours, theirs])
            if not lines:
                continue
            left, right = ([line["seconds"][arm] for line in lines] for arm in (ours, theirs))
            medians = f"{paired.median(left):.2f}", f"{paired.median(right):.2f}"
            target = TARGETS.get((setting, ours, theirs), "")
            rows.append([setting, named(ours), named(theirs), *medians, str(paired.ratio(left, right)), target])
    return table(["setting", "", "beside", "seconds", "seconds", "ratio: median (95% interval, pairs)", "bar"], rows)


def phases(out: Path, settings: Sequence[str]) -> str:
    """Median seconds of each contestant's phases, as it reports them itself. Of TRL only its generation is known."""
    rows = []
    for setting in settings:
        for arm in pairs.ARMS:
            lines = pairs.read(out / "rounds.jsonl", setting, [arm])
            if lines:
                figures = [line["figures"][arm] for line in lines]
                spent = {name.removeprefix("seconds_"): _median(figures, name) for name in figures[0] if name.startswith("seconds_")}
                listed = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items())
                rows.append([setting, named(arm), f"{paired.median([line['seconds'][arm] for line in lines]):.2f}", listed])
    return table(["setting", "", "seconds", "of which"], rows)


def learning(out: Path, settings: Sequence[str]) -> str:
    """Score, KL and length of replies at the ends of each contestant's longest session: all start from the same weights."""
    rows = []
    for setting in settings:
        for arm in pairs.ARMS:
            lines = pairs.read(out / "rounds.jsonl", setting, [arm])
            if not lines:
                continue
            sessions = [line["session"] for line in lines]
            longest = max(set(sessions), key=sessions.count)
            figures = [line["figures"][arm] for line in lines if line["session"] == longest]
            first, last = figures[:EDGE], figures[-EDGE:]
            ends = [f"{_mean(first, name):.2f} to {_mean(last, name):.2f}" for name in ("score", "kl", "reply_tokens")]
            rows.append([setting, named(arm), len(figures), *ends])
    return table(["setting", "", "iterations", "score", "KL, nats per reply", "tokens per reply"], rows)


def memory(out: Path, settings: Sequence[str]) -> str:
    """Peak of all processes together and of each alone, MiB, shared pages in part (PSS), in an iteration after all others."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for setting in settings:
        for line in pairs.lines_of(out / "memory.jsonl", setting):
            found[setting, line["arm"]] = line
    rows = []
    for (setting, arm), line in found.items():
        large = [f"{name.rpartition(' ')[0]} {size // MIB}" for name, size in line["processes"].items() if size >= 10 * MIB]
        small = sum(size for size in line["processes"].values() if size < 10 * MIB)
        rows.append([setting, named(arm), line["total"] // MIB, ", ".join([*large, *([f"others {small // MIB}"] if small else [])])])
    return table(["setting", "", "at most, together", "each"], rows)


def _median(figures: Sequence[dict[str, Any]], name: str) -> float:
    return paired.median([line[name] for line in figures])


def _mean(figures: Sequence[dict[str, Any]], name: str) -> float:
    return sum(line[name] for line in figures) / len(figures)
