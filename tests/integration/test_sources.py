"""Stages on files of our own, each alone in a fresh run, without Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = ("scale.layers=1", "scale.width=16", "scale.heads=2", "scale.feed_forward=32", "scale.vocabulary=400", "scale.context=96")
QUICK = ("runtime=local", "placement=cpu", "model.dtype=fp32", *TINY)
WORDS = "sun moon tree river stone bird cloud lamp".split()


def written(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def pairs(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)
    found = []
    for number in range(count):
        asked = f"\n\nHuman: tell me about {' '.join(rng.sample(WORDS, 3))} {number}\n\nAssistant:"
        found.append({"chosen": f"{asked} gladly, the {rng.choice(WORDS)}", "rejected": f"{asked} go away {rng.choice(WORDS)}"})
    return found


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def overridden(folder: Path, data: str, *more: str) -> list[str]:
    """A small request for these files."""
    return ["run", "experiment=hh_harmless", *QUICK, f"data={data}", f"data.path={folder}", *more]


def test_a_reward_model_is_learned_from_pairs_alone(chatray: Callable[..., Any], tmp_path: Path) -> None:
    written(tmp_path / "pairs.jsonl", [*pairs(60), {"chosen": 3, "rejected": ""}])
    steps = ("reward_model.steps=3", "reward_model.batch=8", "reward_model.eval_every=2", "data.heldout=4", "data.heldout_preferences=10")
    done = chatray(*overridden(tmp_path, "hh", "stage=reward_model", "run_dir=run", *steps), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert set(found["stages"]) == {"reward_model"}
    assert 0 <= found["stages"]["reward_model"]["heldout_pairwise_accuracy"] <= 1
    assert found["stages"]["reward_model"]["contexts_shortened"] == 0
    (source,) = found["data"]["sources"]
    assert source["read"] == 61 == source["used"] + source["held_out"] + source["skipped"] + source["duplicates"]
    assert source["skipped_rows"] == [f"{tmp_path / 'pairs.jsonl'}, line 61: 'chosen' is not text but int"]
    assert "61 rows read" in done.stderr.replace("\n", " ")


def test_sft_learns_from_a_mixture_and_reports_it(chatray: Callable[..., Any], tmp_path: Path) -> None:
    said = [[("user", f"hi {n}"), ("assistant", "hello " * (1 + n % 60))] for n in range(90)]
    talk = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in said]
    written(tmp_path / "talk.jsonl", talk)
    written(tmp_path / "do.jsonl", [{"instruction": f"count to {n}", "output": "one two"} for n in range(30)])
    mix = "data.mix=[{format: messages, path: talk.jsonl, weight: 3}, {format: instructions, path: do.jsonl, weight: 1}]"
    steps = ("sft.steps=3", "sft.batch=8", "sft.eval_every=2", "sft.too_long=keep_end", "data.heldout=12", "data.drop_duplicates=false")
    done = chatray(*overridden(tmp_path, "instructions", "stage=sft", "run_dir=run", mix, *steps), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert abs(found["stages"]["sft"]["mixture"]["messages"]["share"] - 0.75) < 0.01
    assert {s["source"] for s in found["data"]["sources"]} == {"messages", "instructions"}


def test_a_bad_row_ends_the_run_without_a_traceback(chatray: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path / "talk.jsonl", ['{"messages": ['])
    done = chatray(*overridden(file, "instructions", "stage=sft", "run_dir=run", "data.mix=[{format: messages}]"), cwd=tmp_path)
    assert done.returncode == 2
    assert f"{file}, line 1: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
