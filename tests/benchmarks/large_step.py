"""One whole PPO step with four large models on CPU ranks: does it fit the memory, and the time?

    python -m tests.benchmarks.large_step 125m --ranks 2
    python -m tests.benchmarks.large_step 350m --ranks 2 engine.micro_batch=1 engine.offload_optimizer=nvme \\
        engine.offload_parameters=nvme engine.nvme_path=/fast/disk

Policy, critic, reference and reward are of the named scale, with random weights and its whole vocabulary, under ZeRO-3 over as many ranks;
16 prompts of 64 tokens are answered by 64 tokens each (random weights hardly ever end a reply). It is the real command line on real Ray.
The memory is that of all processes together, pages that several share counted once (`PeakMemory`). No sequence is longer than 160 tokens
(`engine.longest`), which is what the preflight plans for: a prompt is 64 tokens or one word more, a reply at most 64.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.world import scenarios
from tests.benchmarks import runs

PROMPTS, TOKENS, REPLY = 16, 64, 64
LONGEST = 160
GIB = 1 << 30


def prepare(folder: Path, scale: str) -> None:
    """A language model, a reward model and a file of prompts."""
    if (folder / "prompts.jsonl").exists():
        return
    config = configuration.load([f"scale={scale}"])
    dialogues = scenarios.demonstrations(200, 0, config.data.flaws)  # type: ignore[union-attr]
    chat = Chat(learn_tokenizer(dialogues, 1024))
    lm = new_causal_lm(config.scale, config.scale.vocabulary, 0, 0.0, chat.end, chat.pad)
    lm.save_pretrained(folder / "lm")
    del lm
    reward = ScalarModel(load_causal_lm(str(folder / "lm")).base_model, seed=1)  # type: ignore[arg-type]
    (folder / "rm").mkdir()
    save_model(reward, reward.state_dict(), folder / "rm")
    for part in ("lm", "rm"):
        chat.save(folder / part)
    words = sorted({word for dialogue in dialogues for message in dialogue.messages for word in message.content.split() if word.isalpha()})
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for number in range(4 * PROMPTS):
            question = asked(chat, words, random.Random(number))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
            file.write(json.dumps({"messages": messages}) + "\n")


def asked(chat: Chat, words: list[str], draw: random.Random) -> str:
    """A question that makes a prompt of `TOKENS` tokens, or one more."""
    chosen: list[str] = []
    while True:
        chosen.append(draw.choice(words))
        text = " ".join(chosen)
        if len(chat.prompt(Dialogue("", (Message("user", text),)))) >= TOKENS:
            return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-large-step"))
    parser.add_argument("settings", nargs="*", help="further settings, as on the command line")
    wanted = parser.parse_args()
    folder = (wanted.out / wanted.scale).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, wanted.scale)
    run = folder / f"run-{int(time.time())}"
    ranks = [
        f"placement.{role}.{name}"
        for role in ("policy", "critic", "reference", "reward")
        for name in (f"ranks={wanted.ranks}", "threads=1")
    ]
    words = [
        f"scale={wanted.scale}", "data=instructions", "labeler=recorded", "stage=ppo", "checks=warn",
        f"data.mix=[{{format: messages, path: {folder}/prompts.jsonl}}]", "data.heldout=2",
        f"run_dir={run}", f"policy_checkpoint={folder}/lm", f"reward_checkpoint={folder}/rm", "model.dtype=fp32",
        "engine.zero_stage=3", "engine.micro_batch=2", "ppo.steps=1", f"ppo.batch={PROMPTS}", f"ppo.max_new_tokens={REPLY}",
        "ppo.minibatches=1", "ppo.epochs=1",
        "ppo.judge.every=0", "ppo.missing_end_penalty=0", "deadlines.start=900", "deadlines.step=900", "logging.progress=false",
        "ray.object_store_mb=1024", "commit.every=1000", f"engine.longest={LONGEST}", "placement.rollout.ranks=1", *ranks, *wanted.settings,
    ]  # fmt: skip
    began = time.perf_counter()
    runs.chatray(words, folder / "log.txt")
    seconds = time.perf_counter() - began
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (record,) = [json.loads(line) for line in (run / "round_01/ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = summary["peak_rss_bytes"] / GIB
    print(f"{wanted.scale}, ZeRO-3, {wanted.ranks} ranks a role: {seconds:.0f} s from start to end, {peak:.1f} GiB at most")
    print(json.dumps({name: value for name, value in record.items() if "second" in name or name in ("kl", "reply_tokens", "length")}))


if __name__ == "__main__":
    main()
