"""Stage 2, comparisons: a model-written turn of a conversation is picked, K alternatives are sampled, and somebody ranks them.

With recorded preferences there is nothing to sample: the stage hands on what people ranked or judged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.sampling import Sampling
from orchestration import roles
from orchestration.data import comparisons, labeler
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.fitting import fitting_prompts
from orchestration.data.preferences import Comparison
from orchestration.errors import RequestError
from orchestration.stages.context import StageContext
from orchestration.stages.sampling import Sampler

SAMPLING_PIECE = 64
"""Contexts per piece sent to the rollout engines."""
SECOND_LABELER = 1_000_003
"""Added to the seed: a second labeller, who judges how well two of them agree."""


def run(context: StageContext) -> dict[str, float]:
    """Returns how many comparisons were made, by the labeller's noise and agreement where there is one."""
    if context.config.labeler.kind == "recorded":
        return _recorded(context)
    config = context.config.compare
    context.metrics.begin("compare", config.prompts + config.heldout_prompts)
    started = roles.start(context.runtime, context.config, {"rollout": str(context.input("sft"))})
    try:
        sampler = Sampler(context.runtime, started, context.chat, context.config.placement.rollout.ranks, SAMPLING_PIECE)
        train, lost = _sampled(context, sampler, context.corpus.prompts, config.prompts, "train")
        held_out, held_out_lost = _sampled(context, sampler, context.corpus.comparison_prompts, config.heldout_prompts, "heldout")
    finally:
        context.runtime.stop()
    return _labelled(context, train, held_out) | {name: lost[name] + held_out_lost[name] for name in lost}


def _sampled(
    context: StageContext, sampler: Sampler, prompts: Sequence[Dialogue], count: int, name: str
) -> tuple[list[Comparison], dict[str, int]]:
    """`count` unranked comparisons, and how many prompts lost turns or were left out for the context's length.

    Randomness is keyed by the prompt, so it does not depend on the batch.
    """
    config = context.config
    room = context.longest - config.compare.max_new_tokens
    fitted = fitting_prompts(prompts, context.chat, room)
    if not fitted.kept:
        raise RequestError(
            f"data: none of the {len(prompts)} prompts leaves room for compare.max_new_tokens={config.compare.max_new_tokens}"
        )
    rng = random.Random(f"compare {name} {config.seed}")
    chosen = rng.sample(fitted.kept, min(count, len(fitted.kept)))
    written = _model_written(chosen, sampler, config.compare.max_new_tokens, config.compare.temperature, config.seed, rng, name)
    written, shortened, left_out = fitting_prompts(written, context.chat, room)
    sizes = [rng.randint(config.compare.k_min, config.compare.k_max) for _ in written]
    asked = [(number, sample) for number, size in enumerate(sizes) for sample in range(size)]
    sampling = Sampling(config.compare.temperature, config.compare.max_new_tokens, config.seed, _step(name, 0))
    texts, finished = sampler.sample([written[n] for n, _ in asked], asked, sampling, f"{name} answers")
    done = len(written) + (config.compare.prompts if name == "heldout" else 0)
    context.metrics.record(done, {"comparisons": float(len(written)), "answers": float(len(texts))})
    lost = {"prompts_shortened": fitted.shortened + shortened, "prompts_left_out": fitted.left_out + left_out}
    return _grouped(written, sizes, texts, finished), lost


def _grouped(written: Sequence[Dialogue], sizes: Sequence[int], texts: list[str], finished: list[bool]) -> list[Comparison]:
    found, start = [], 0
    for dialogue, size in zip(written, sizes, strict=True):
        found.append(Comparison(dialogue, tuple(texts[start : start + size]), tuple(finished[start : start + size])))
        start += size
    return found


def _step(name: str, depth: int) -> int:
    """A number for the sampling key that no PPO step uses."""
    return 2**31 + 1000 * ("train", "heldout").index(name) + depth


def _model_written(
    prompts: Sequence[Dialogue], sampler: Sampler, max_new_tokens: int, temperature: float, seed: int, rng: random.Random, name: str
) -> list[Dialogue]:
    """Contexts of one assistant turn of each conversation, picked at random, with the turns before it written by the model.

    Turns that belong to the task (a planted mistake) stay as they are and are not picked.
    """
    turns = [[*p.assistant_turns(), len(p.messages)] for p in prompts]
    picked = [rng.choice(options) for options in turns]
    found = [Dialogue(p.id, p.messages[:turn]) for p, turn in zip(prompts, picked, strict=True)]
    for depth in range(max(map(len, turns))):
        asked = [n for n in range(len(found)) if depth < len(turns[n]) and turns[n][depth] < picked[n]]
        if not asked:
            break
        sampling = Sampling(temperature, max_new_tokens, seed, _step(name, 1 + depth))
        contexts = [found[n].before(turns[n][depth]) for n in asked]
        texts, _ = sampler.sample(contexts, [(n, 0) for n in asked], sampling, f"turns of {name} conversations")
        for n, text in zip(asked, texts, strict=True):
            found[n] = _with_reply(found[n], turns[n][depth], text)
    return found


def _with_reply(dialogue: Dialogue, turn: int, text: str) -> Dialogue:
    messages = list(dialogue.messages)
    messages[turn] = Message("assistant", text)
    return replace(dialogue, messages=tuple(messages))


def _labelled(context: StageContext, train: list[Comparison], held_out: list[Comparison]) -> dict[str, float]:
    wanted, seed = context.config.labeler.agreement, context.config.seed
    try:
        noise = labeler.noise_for(wanted, train)
    except ValueError as cause:
        raise RequestError(str(cause)) from cause
    one, other = labeler.SimulatedLabeler(noise, seed), labeler.SimulatedLabeler(noise, seed + SECOND_LABELER)
    first = [c.ranked(one.rank(c)) for c in train]
    second = [c.ranked(other.rank(c)) for c in train]
    tests = [c.ranked(one.rank(c)) for c in held_out]

    def save(folder: Path) -> None:
        comparisons.write(folder / comparisons.TRAIN_FILE, first)
        comparisons.write(folder / comparisons.HELD_OUT_FILE, tests)

    context.directory.export(save)
    return {
        "comparisons": len(first),
        "answers": sum(len(c.answers) for c in first),
        "heldout_comparisons": len(tests),
        "labeler_noise": noise,
        "labeler_agreement": labeler.agreement(first, second),
        "labeler_ceiling": labeler.ceiling(tests),
    }


def _recorded(context: StageContext) -> dict[str, float]:
    corpus = context.corpus
    context.metrics.begin("compare", 1)
    ranked = corpus.ranked()

    def save(folder: Path) -> None:
        for name, rankings, judged in (
            (comparisons.TRAIN_FILE, corpus.comparisons, corpus.judgements),
            (comparisons.HELD_OUT_FILE, corpus.held_out_comparisons, corpus.held_out_judgements),
        ):
            if ranked:
                comparisons.write(folder / name, rankings)
            else:
                comparisons.write_judgements(folder / name, judged)

    context.directory.export(save)
    if ranked:
        answers = sum(len(c.answers) for c in corpus.comparisons)
        return {"comparisons": len(corpus.comparisons), "answers": answers, "heldout_comparisons": len(corpus.held_out_comparisons)}
    return {
        "judgements": len(corpus.judgements),
        "good_share": sum(j.good for j in corpus.judgements) / len(corpus.judgements),
        "heldout_judgements": len(corpus.held_out_judgements),
    }
