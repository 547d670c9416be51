"""Runs of the recipe for benchmarks that compare many: through the real command line, one thread each; resumable; in a table at the end.

Each run is a subprocess. Its result is a line of `<out>/results.jsonl`, and a run that has its line is not made again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("train", "policy", "critic", "reference", "reward", "rollout")
ONE_THREAD = ["runtime=local", "placement=cpu", *(f"placement.{role}.threads=1" for role in ROLES), "logging.progress=false"]
ONE_THREADED = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RESAMPLES = 10_000
MEASURED = 2**31 + 700_001
"""Number for the sampling key that no stage uses."""
Task = Mapping[str, Any]
"""What names a run: arm, kind, seed."""
T = TypeVar("T")


def chatray(words: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
    """`chatray run …` in a process of its own, from the repository's folder; what it prints goes to `log`.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = ONE_THREADED if "runtime=local" in words else {}
    environment = os.environ | threads | {"PYTHONPATH": path} | dict(variables or {})
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "orchestration.cli", "run", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]))


def make(run: Path, stages: Sequence[str], words: Sequence[str] = ()) -> None:
    """The stages of experiment=quickstart in `run`, those that are not there yet."""
    for stage in stages:
        if not (run / "round_01" / stage / "checkpoint").is_dir():
            print(f"{run}: stage {stage}", flush=True)
            chatray(["experiment=quickstart", f"stage={stage}", f"run_dir={run.resolve()}", *words], run / f"bench-{stage}.log")


def checkpoint(run: Path, stage: str) -> str:
    return str((run / "round_01" / stage / "checkpoint").resolve())


def result_of(run: Path, stage: str) -> dict[str, Any]:
    """A finished stage's figures."""
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"][stage]


def read(out: Path) -> list[dict[str, Any]]:
    """Lines of the finished runs."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def work(out: Path, tasks: Iterable[Task], do: Callable[..., dict[str, Any]], jobs: int, *given: Any) -> list[dict[str, Any]]:
    """`do(out, task, *given)` for each task without a line, `jobs` at once, in processes of their own; returns all lines.

    Raises:
        SystemExit: some failed, after all others were done.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = read(out)
    left = [task for task in tasks if not any(task.items() <= line.items() for line in done)]
    if not left:
        return done
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= ONE_THREADED  # before torch is loaded in those processes
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(do, out, task, *given): task for task in left}
        for future in as_completed(running):
            task = running[future]
            if error := future.exception():
                failed.append(task)
                print(f"failed: {dict(task)}: {error}", file=sys.stderr, flush=True)
                continue
            line = dict(task) | future.result()
            with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; the same command makes these again")
    return read(out)


def gold(folder: str, prompts: int, seed: int, max_new_tokens: int, world: int) -> np.ndarray:
    """[prompts]: the exact grade of one sampled reply of a model to each held-out prompt.

    Args:
        seed: of the sampling noise; the same for two models, so that they differ by their weights alone.
        world: seed of the prompts, from the split that no stage learns from.
    """
    import torch

    from actors.models import load_causal_lm
    from actors.rollout_transformers import TransformersEngine
    from actors.sampling import Sampling
    from orchestration import config
    from orchestration.data.chat import Chat, load_tokenizer
    from orchestration.data.world import scenarios
    from orchestration.data.world.gold import grade

    torch.set_num_threads(1)
    settings = config.load(["experiment=quickstart"])
    chat = Chat(load_tokenizer(folder, "model.tokenizer"))
    contexts = scenarios.prompts(prompts, world, settings.data.flaws, judging=True)  # type: ignore[union-attr]
    lm = load_causal_lm(folder)
    engine = TransformersEngine(lm, int(lm.generation_config.eos_token_id), torch.device("cpu"))
    rows = chat.prompts(contexts, [(number, 0) for number in range(prompts)])
    sampling, grades = Sampling(1.0, max_new_tokens, seed, MEASURED), np.empty(prompts)
    for batch in rows.lengths.argsort(stable=True).split(128):
        found = engine.generate(rows.select(batch).trimmed(), sampling)
        replies = [chat.decode(tokens[mask].tolist()) for tokens, mask in zip(found.tokens, found.mask, strict=True)]
        given = zip(batch.tolist(), replies, found.finished.tolist(), strict=True)
        grades[batch.numpy()] = [grade(contexts[n], reply, ended) for n, reply, ended in given]
    return grades


def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95% percentile bootstrap of the mean of [seeds, prompts]; seeds and prompts are resampled, each with all it has.

    With three seeds the part of the spread that is between seeds is known poorly: three draws of three have ten outcomes.
    """
    rng, (seeds, prompts) = np.random.default_rng(seed), differences.shape
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts
    means = np.einsum("rs,sp,rp->r", weights, differences, counts, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers with three digits."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)


def of(lines: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The lines with these values, in the order of their seeds."""
    return sorted((line for line in lines if wanted.items() <= line.items()), key=lambda line: line["seed"])
