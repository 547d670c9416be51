"""Contestant: TRL's PPOTrainer, in its own environment. Imports nothing of chatray's.

Same weights, prompts, replies' limit, epochs, minibatches, learning rate, KL penalty and Adam's constants as ours; no gradient clipping,
since it does none. `per_device_train_batch_size` is the whole batch and nothing is accumulated: only so is each minibatch an optimizer step
(accelerate would step once per accumulated batch). Its padding token is one that no model can sample: it takes every padding token for the
end of a reply. bf16 is what `accelerate launch --mixed_precision bf16` sets: autocast around the trained models, float32 weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
folder, run_dir, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
kernel = sys.argv[4] if len(sys.argv) > 4 else "sdpa"
os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == "bf16" else "no"
setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
os.environ["OMP_NUM_THREADS"] = str(setting["threads"])
if setting["device"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import EndedError, Turns  # noqa: E402

turns = Turns()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402
from trl.experimental.ppo import ppo_trainer as module  # noqa: E402

torch.set_num_threads(setting["threads"])


class Paced(TrainerCallback):
    """Hands each iteration over and waits for the next; `on_log` has seen its figures."""

    def __init__(self, phases: dict[str, float]) -> None:
        self.phases, self.figures = phases, {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.figures = logs or {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        score, kl = self.figures.get("objective/scores", 0.0), self.figures.get("objective/kl", 0.0)
        found = {"score": score, "kl": kl, "reply_tokens": self.phases.pop("reply_tokens", 0.0)}
        spent = dict(self.phases)
        self.phases.clear()
        turns.hand_over(found | {f"seconds_{name}": seconds for name, seconds in spent.items()})


def timed_generation(phases: dict[str, float], end: int | None, prompt: int):
    """`batch_generation` with its seconds and the replies' length noted."""
    plain = module.batch_generation

    def generation(*args, **kwargs):
        began = time.perf_counter()
        tokens, logits = plain(*args, **kwargs)
        phases["rollout"] = time.perf_counter() - began
        replies = tokens[:, prompt:]
        ended = (replies == end).int() if end is not None else torch.zeros_like(replies)
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, replies.shape[1])
        phases["reply_tokens"] = float(lengths.float().mean())
        return tokens, logits

    return generation


def scalar_model():
    """The reward model, and the critic, from chatray's folder: a backbone and a head without bias."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm", num_labels=1, dtype=torch.float32, attn_implementation=kernel)
    head = load_file(folder / "rm" / "scalar_head.safetensors")
    with torch.no_grad():
        model.score.weight.copy_(head["weight"])
    return model


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm", padding_side="left")
    rows = AutoConfig.from_pretrained(folder / "lm").vocab_size
    tokenizer.add_tokens([f"<|unused {number}|>" for number in range(len(tokenizer), rows)])  # so that the next has no row in the model
    tokenizer.add_special_tokens({"pad_token": "<|never sampled|>"})
    assert tokenizer.pad_token_id >= rows
    prompts = [prompt["tokens"] for prompt in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32, attn_implementation=kernel) for _ in range(2)
    )
    batch = setting["prompts"]
    config = PPOConfig(
        output_dir=run_dir, use_cpu=setting["device"] == "cpu", bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        save_strategy="no",
        logging_steps=1, num_sample_generations=0, seed=0, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=setting["minibatches"], num_ppo_epochs=setting["epochs"], total_episodes=batch * 100_000,
        local_rollout_forward_batch_size=batch, response_length=setting["limit"], temperature=1.0, learning_rate=setting["lr"],
        lr_scheduler_type="constant", adam_epsilon=1e-5, adam_beta2=0.95, weight_decay=0.0, kl_coef=setting["beta"], vf_coef=0.1,
        stop_token="eos" if setting["ends"] else None, missing_eos_penalty=1.0 if setting["ends"] else None,
    )  # fmt: skip
    phases: dict[str, float] = {}
    end = tokenizer.eos_token_id if setting["ends"] else None
    module.batch_generation = timed_generation(phases, end, max(map(len, prompts)))
    rows = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=scalar_model(),
        value_model=scalar_model(), train_dataset=rows, eval_dataset=rows, callbacks=[Paced(phases)],
    )  # fmt: skip
    with contextlib.suppress(EndedError):
        trainer.train()


if __name__ == "__main__":
    main()
