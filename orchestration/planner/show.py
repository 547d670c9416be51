"""The plan for people: who holds what, where it stands, how long a step takes, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table

from orchestration.planner.layout import Placed
from orchestration.planner.memory import KINDS, PLACES
from orchestration.planner.plan import Part, Plan, amount
from orchestration.planner.waits import too_short

FILE_WIDTH = 170
"""Columns where the output goes to a file."""


def show(found: Plan, console: Console | None = None) -> None:
    """Print it."""
    out = console or Console(highlight=False)
    if not out.is_terminal:  # a table that is cut to the width of nothing helps nobody
        out.width = FILE_WIDTH
    out.print(_roles(found))
    for part in found.parts:
        _draw(out, part)
    if found.step:
        _times(out, found)
    out.print(f"commits and exports below run_dir: {amount(found.disk)}")
    out.print(f"what binds: {found.binds}", soft_wrap=True)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    for reason in too_short(found.waits):
        out.print("[red]a deadline is too short[/red]", end=": ")
        out.print(reason, markup=False, soft_wrap=True)
    if found.fits:
        out.print("[green]it fits[/green]")
        return
    out.print("[red]it does not fit[/red]")
    for reason in found.reasons:
        out.print(f"  {reason}", markup=False, soft_wrap=True)
    if found.remedies:
        out.print("changes that make it fit, the smallest first (each was planned):")
    for number, remedy in enumerate(found.remedies, 1):
        out.print(f"  {number}. {' '.join(remedy.changes)}", markup=False, soft_wrap=True)
        out.print(f"     then binds {remedy.binds}", markup=False, style="dim", soft_wrap=True)
    if not found.remedies:
        out.print("no one, two or three changes of those that are tried make it fit; a smaller scale and more machines together may")


def _roles(found: Plan) -> Table:
    """A row for each role, a column for each kind that anybody holds."""
    kept = {name: role.memory.by_kind() for name, role in found.roles.items()}
    columns = [kind for kind in (*KINDS, *PLACES[1:], "loading") if any(sizes[kind] for sizes in kept.values())]
    table = Table(title=f"bytes per rank on {found.cluster}", title_justify="left")
    for heading in ("role", "model", "ranks", *map(_heading, columns)):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for name, role in found.roles.items():
        ranks = f"{role.ranks} x {role.devices}" if role.devices > 1 else str(role.ranks)
        table.add_row(name, _count(role.parameters), ranks, *(amount(kept[name][kind]) for kind in columns))
    return table


def _heading(column: str) -> str:
    """A column's name, and below it where its bytes lie: the columns of other places hold what was moved there, of all kinds."""
    where = {"host": "of all kinds", "nvme": "of all kinds", "disk": "of all kinds", "loading": "(host, at first)"}
    return f"{column.replace('_', ' ')}\n{where.get(column, '(device)')}"


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:,}" if parameters else "-"


def _draw(out: Console, part: Part) -> None:
    out.print(f"{part.name}: fullest device {amount(part.device)}, fullest node's memory {amount(part.host)}" if part.device else
              f"{part.name}: fullest node's memory {amount(part.host)}")  # fmt: skip
    for placed in part.layout.placed:
        out.print(f"  {drawn(placed)}", markup=False, soft_wrap=True)
    if part.layout.homeless:
        out.print(f"  no room for {len(part.layout.homeless)} of {part.layout.wanted} bundles", style="red")


def drawn(placed: Placed) -> str:
    """One node in a line: `node 0 | GPU 0-7: policy 0-7, critic 0-7, rollout 0`."""
    if not placed.ranks and not placed.devices:
        return f"{placed.node.name} | idle"
    lines = []
    numbered = list(enumerate(placed.devices))
    for _, run in groupby(numbered, key=lambda pair: sorted({role for role, _ in pair[1]})):
        devices = list(run)
        lines.append(f"GPU {_range([n for n, _ in devices])}: {_everyone([r for _, there in devices for r in there])}")
    idle = int(placed.node.gpus) - len(placed.devices)
    if idle > 0 and placed.devices:
        lines.append(f"{idle} GPUs idle")
    return f"{placed.node.name} | {' | '.join(lines or [f'CPUs: {_everyone(placed.ranks)}'])}"


def _everyone(ranks: list[tuple[str, int]]) -> str:
    found: dict[str, list[int]] = {}
    for role, rank in ranks:
        found.setdefault(role, []).append(rank)
    return ", ".join(f"{role} {_range(sorted(set(numbers)))}" for role, numbers in found.items())


def _range(numbers: list[int]) -> str:
    return ",".join(_runs(numbers))


def _runs(numbers: list[int]) -> Iterator[str]:
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _times(out: Console, found: Plan) -> None:
    step = found.step
    assert step is not None
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in step.phases.items())
    cost = f", ${step.dollars:.2f}" if step.dollars is not None else ""
    out.print(f"one step of PPO: {step.tokens:,} tokens in {duration(step.seconds)}{cost} ({phases})", soft_wrap=True)
    for assumption in step.assumptions:
        out.print(f"  assumed: {assumption}", style="dim", soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
