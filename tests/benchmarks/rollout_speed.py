"""Tokens per second through the rollout role on Ray, beside the same engine bare, in pairs that alternate.

    python -m tests.benchmarks.rollout_speed vllm --pairs 20
    python -m tests.benchmarks.rollout_speed transformers --pairs 20 --checkpoint runs/taskmaster_coffee/round_01/sft/checkpoint

`vllm`: the actor beside vLLM's own loop in this process, with the same settings, prompts and seeds. `transformers`: the actor beside
`model.generate`, which carries ended replies along to the end of the longest; that counts on a trained `--checkpoint`, whose replies end by
themselves (prompts are taken from a `prompts.json` beside it). Without one the model has random weights of `scale=` and its replies hardly
ever end. The one that is not asked is idle. Given are the median of the ratio (actor over bare), its 95% interval over resampled pairs, and
both medians in tokens per second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from actors.batch import Prompts, Rollouts, pad_rows
from actors.decoding import left_padded
from actors.models import load_causal_lm, new_causal_lm
from actors.sampling import Sampling
from conf.schema import Config
from orchestration import config as configuration
from orchestration import roles
from orchestration.runtime.dispatch import cut

LONGEST_PROMPT = 24


def prompts(count: int, vocabulary: int, known: Path | None) -> Prompts:
    """Of random tokens; or, for a policy of `step_time`, those that lie beside it, one after the other."""
    draw = np.random.default_rng(0)
    if known is not None and known.exists():
        given = [prompt["tokens"] for prompt in json.loads(known.read_text(encoding="utf-8"))]
        tokens, lengths = pad_rows([given[number % len(given)] for number in range(count)])
    else:
        tokens, lengths = pad_rows([draw.integers(4, vocabulary, draw.integers(4, LONGEST_PROMPT)).tolist() for _ in range(count)])
    return Prompts(tokens, lengths, torch.tensor([[n, 0] for n in range(count)]))


def actor(config: Config, path: str, asked: Prompts) -> tuple[Callable[[int], int], Callable[[], None]]:
    """(sample all prompts through the role and give the number of tokens, end)."""
    runtime = roles.connect(config)
    rollout = roles.start(runtime, config, {"rollout": path}).rollout

    def sample(step: int) -> int:
        pieces = rollout.generate(runtime.put(cut(asked, 1, 64)), Sampling(1.0, config.ppo.max_new_tokens, 0, step))
        return int(Rollouts.join(runtime.get(pieces, "replies")).mask.sum())

    return sample, runtime.close


def bare_vllm(config: Config, path: str, asked: Prompts) -> Callable[[int], int]:
    from actors import rollout_vllm

    engine = rollout_vllm.VLLMEngine(config, path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def sample(step: int) -> int:
        sampling = Sampling(1.0, config.ppo.max_new_tokens, 0, step)
        for number, (ids, key) in enumerate(zip(rollout_vllm.rows(asked), asked.keys.tolist(), strict=True)):
            engine.llm.add_request(str(number), {"prompt_token_ids": ids}, rollout_vllm.request(sampling, key, engine.end))
        tokens = 0
        with rollout_vllm.eager_torch(engine.eager):
            while engine.llm.has_unfinished_requests():
                tokens += sum(len(output.outputs[0].token_ids) for output in engine.llm.step())
        return tokens

    return sample


def bare_transformers(config: Config, path: str, asked: Prompts) -> Callable[[int], int]:
    lm = load_causal_lm(path).eval()
    tokens, attention = left_padded(asked.tokens, asked.lengths, int(asked.lengths.max()))
    end = lm.generation_config.eos_token_id

    @torch.no_grad()
    def sample(step: int) -> int:
        torch.manual_seed(step)
        found = lm.generate(  # type: ignore[operator]
            tokens, attention_mask=attention, do_sample=True, top_k=0, max_new_tokens=config.ppo.max_new_tokens, pad_token_id=0
        )[:, tokens.shape[1] :]
        ended = (found == end).long().cumsum(dim=1)
        return int(((ended == 0) | ((ended == 1) & (found == end))).sum())

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "transformers"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--checkpoint", help="a causal LM; by default one with random weights")
    asked_for, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked_for.checkpoint and str(Path(asked_for.checkpoint).resolve())
        config = configuration.load(
            ["scale=tiny", "placement=cpu", "ppo.max_new_tokens=64", f"rollout={asked_for.engine}", f"run_dir={folder}/run", *words]
        )
        torch.set_num_threads(config.placement.rollout.threads)
        if not path:
            path = f"{folder}/lm"
            new_causal_lm(config.scale, config.scale.vocabulary, 0, 0.0, 1, 0).save_pretrained(path)
        asked = prompts(asked_for.prompts, load_causal_lm(path).config.vocab_size, Path(path).parent / "prompts.json")
        through_role, end = actor(config, path, asked)
        try:
            bare = (bare_vllm if asked_for.engine == "vllm" else bare_transformers)(config, path, asked)
            found = compared(through_role, bare, asked_for.pairs)
            print(
                "| engine | prompts | through the role, tokens/s | bare, tokens/s | ratio: median (95% interval) |\n|---|---|---|---|---|"
            )
            ratio = f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
            print(f"| {asked_for.engine} | {len(asked)} | {found['role']:.0f} | {found['bare']:.0f} | {ratio} |")
        finally:
            end()


def compared(ours: Callable[[int], int], bare: Callable[[int], int], pairs: int) -> dict[str, float]:
    """Rates of both in pairs, each pair in the other order than the one before; the first pair warms up."""
    rates = np.empty((pairs + 1, 2))
    for pair in range(pairs + 1):
        for column in (0, 1) if pair % 2 else (1, 0):
            began = time.perf_counter()
            rates[pair, column] = (ours, bare)[column](pair) / (time.perf_counter() - began)
    ratio = rates[1:, 0] / rates[1:, 1]
    drawn = np.median(np.random.default_rng(0).choice(ratio, (2000, pairs)), axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    role, alone = np.median(rates[1:], axis=0)
    return {"ratio": float(np.median(ratio)), "low": float(low), "high": float(high), "role": float(role), "bare": float(alone)}


if __name__ == "__main__":
    main()
