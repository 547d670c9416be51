"""What a run found, for people: a table of results and a few conversations, SFT beside PPO, on the terminal and as a page."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from orchestration.curve import svg
from orchestration.errors import RequestError
from orchestration.run_directory import RunDirectory, read_json
from orchestration.stages.evaluate import CONVERSATIONS_FILE

ROWS = (
    ("Pretraining held-out loss", "pretrain", "heldout_nats_per_token", "nats/token"),
    ("", "pretrain", "heldout_nats_per_byte", "nats/byte"),
    ("SFT held-out loss", "sft", "heldout_nats_per_token", "nats/token"),
    ("", "sft", "heldout_nats_per_char", "nats/character"),
    ("Labellers agree on", "compare", "labeler_agreement", "of pairs"),
    ("Reward model, held-out accuracy", "reward_model", "heldout_pairwise_accuracy", "of pairs"),
    ("  the exact grade reaches", "reward_model", "labeler_ceiling", "of pairs"),
    ("  TF-IDF on the same comparisons", "reward_model", "baseline_pairwise_accuracy", "of pairs"),
    ("  difference, with 95% interval", "reward_model", "pairwise_accuracy_difference", "of pairs"),
    ("  when sure (p above 0.8)", "reward_model", "heldout_accuracy_sure", "of pairs"),
    ("  when the longer answer won", "reward_model", "heldout_accuracy_longer_preferred", "of pairs"),
    ("  when the shorter answer won", "reward_model", "heldout_accuracy_shorter_preferred", "of pairs"),
    ("Reward model, calibration error", "reward_model", "heldout_calibration_error", ""),
    ("Reward model, held-out AUC", "reward_model", "heldout_auc", ""),
    ("  TF-IDF on the same judgements", "reward_model", "baseline_auc", ""),
    ("  difference, with 95% interval", "reward_model", "auc_difference", ""),
    ("PPO: KL to the reference", "ppo", "kl", "nats/reply"),
    ("  budget", "ppo", "kl_budget", "nats/reply"),
    ("Held-out text, SFT", "ppo", "pretraining_loss_sft", "nats/token"),
    ("Held-out text, PPO", "ppo", "pretraining_loss", "nats/token"),
    ("Gold score, SFT", "evaluate", "gold_sft", ""),
    ("Gold score, PPO", "evaluate", "gold_ppo", ""),
    ("PPO wins over SFT (sampled)", "evaluate", "gold_win_rate_vs_sft", ""),
    ("  95% interval", "evaluate", "gold_win_rate_ci95", ""),
    ("PPO wins over SFT (greedy)", "evaluate", "gold_win_rate_greedy", ""),
    ("Score by the reward, SFT", "evaluate", "rm_score_sft", ""),
    ("Score by the reward, PPO", "evaluate", "rm_score_ppo", ""),
    ("KL on held-out prompts", "evaluate", "kl", "nats/reply"),
    ("Reply length, SFT", "evaluate", "reply_tokens_sft", "tokens"),
    ("Reply length, PPO", "evaluate", "reply_tokens_ppo", "tokens"),
    ("Held-out prompts", "evaluate", "prompts", ""),
)


def show(path: Path, count: int, seed: int) -> None:
    """Print a run's report and write it to `report.html`.

    Raises:
        RequestError: there is no run at `path`.
    """
    summary = read_json(path / "summary.json")
    if not summary:
        raise RequestError(f"run={path}: no run there (no summary.json)")
    # one recording for the page, whatever the terminal is; drawn to nowhere
    page = Console(record=True, width=110, file=io.StringIO())
    ppo = summary["stages"].get("ppo", {})
    for console in (Console(), page):
        console.print(results(summary))
        for table in (checked(ppo), warned(ppo), rollbacks(ppo), curve_table(ppo)):
            if table.row_count:
                console.print(table)
        for panel in conversations(path, count, seed):
            console.print(panel)
    page.save_html(str(path / "report.html"))
    if ppo.get("curve"):
        _add_picture(path, svg(ppo["curve"]))


def results(summary: dict[str, Any]) -> Table:
    """The table of headline figures; a figure that does not apply is not there."""
    table = Table(title=f"Results ({summary['seconds']:.0f} s, peak memory {summary['peak_rss_bytes'] / 2**30:.1f} GiB)")
    for title, justify in (("what", "left"), ("figure", "right"), ("unit", "left")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for title, stage, name, unit in ROWS:
        found = summary["stages"].get(stage, {})
        if found.get(name) is not None:
            table.add_row(title, _number(found[name]) + _interval(found, name), unit)
    return table


def checked(ppo: dict[str, Any]) -> Table:
    """What PPO checked of itself, each at its worst."""
    table = Table("check", "passed", "seen", "bound", title="Checks of PPO")
    for name, found in ppo.get("checks", {}).items():
        table.add_row(name, "yes" if found["passed"] else "[red]no[/red]", f"{found['seen']:.3g}", f"{found['bound']:g}")
    return table


def warned(ppo: dict[str, Any]) -> Table:
    """The illnesses that PPO showed."""
    table = Table("illness", "first step", "last step", "steps", title="Warnings of PPO")
    for name, found in ppo.get("warnings", {}).items():
        table.add_row(name, *(f"{found[key]}" for key in ("first", "last", "steps")))
    return table


def rollbacks(ppo: dict[str, Any]) -> Table:
    """Where PPO went back, for its KL was above the budget."""
    table = Table("from step", "to step", "KL seen", "beta after", title="Rollbacks of PPO")
    for found in ppo.get("rollbacks", []):
        table.add_row(f"{found['from']}", f"{found['to']}", _number(found["kl"]), _number(found["beta"]))
    return table


def curve_table(ppo: dict[str, Any]) -> Table:
    """The held-out judge's measurements."""
    table = Table("step", "root of KL", "reward model", "exact grade", "tokens", title="Held-out prompts during PPO")
    for point in ppo.get("curve", []):
        figures = [_number(point[name]) if name in point else "" for name in ("sqrt_kl", "score", "gold", "reply_tokens")]
        table.add_row(f"{point['step']:g}", *figures)
    return table


def _add_picture(path: Path, picture: str) -> None:
    """As a file beside the page, and on the page."""
    (path / "curve.svg").write_text(picture, encoding="utf-8")
    page = (path / "report.html").read_text(encoding="utf-8")
    (path / "report.html").write_text(page.replace("</body>", f"{picture}</body>"), encoding="utf-8")


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{v:.3f}" for v in value)
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _interval(found: dict[str, Any], name: str) -> str:
    """Of a figure whose ends stand beside it."""
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    return "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"


def conversations(path: Path, count: int, seed: int) -> list[Panel]:
    """A few evaluated prompts with both models' sampled replies, chosen at random."""
    file = RunDirectory(path, 1).stage("evaluate").checkpoint / CONVERSATIONS_FILE
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    return [Panel(_conversation(row), title=row["id"], title_align="left") for row in chosen]


def _conversation(row: dict[str, Any]) -> str:
    from rich.markup import escape

    lines = [f"[dim]{m['role']:>9}[/dim]  {escape(m['content'])}" for m in row["context"]]
    for name, colour in (("sft", "yellow"), ("ppo", "green")):
        lines.append(
            f"[{colour}]{name.upper():>9}[/{colour}]  {escape(row['replies'][name])}   [dim]score {row['rm_scores'][name]:+.2f}[/dim]"
        )
    return "\n".join(lines)
