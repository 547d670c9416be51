"""The rollout role: it samples replies with an engine, from the weights that it was sent last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from actors.batch import Prompts, Rollouts
from actors.models import load_causal_lm
from actors.rank import off_device
from actors.rollout_transformers import TransformersEngine
from actors.sampling import RolloutEngine, Sampling
from actors.weight_sync import Arrivals, WeightUpdate, unpack
from actors.worker import Worker

if TYPE_CHECKING:
    from actors.rollout_vllm import VLLMEngine


class Rollout(Worker):
    """One rollout rank: an engine, its weights, and the end-of-turn token it stops at."""

    def join(self, host: str, port: int, timeout: float) -> None:
        """Engines have nothing to say to each other, and vLLM makes process groups of its own, the default one among them."""
        if self.config.rollout.engine != "vllm":
            super().join(host, port, timeout)

    def load(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine: RolloutEngine = self._vllm() if self.config.rollout.engine == "vllm" else self._transformers()
        self.asleep = False
        self.arrivals = Arrivals()

    def _transformers(self) -> RolloutEngine:
        lm = load_causal_lm(self.checkpoint)
        end = lm.generation_config.eos_token_id
        end = int(end[0] if isinstance(end, list) else end)  # chat models may list several; the first is the turn's end
        return TransformersEngine(lm, end, self.device)

    def _vllm(self) -> VLLMEngine:
        from actors.rollout_vllm import VLLMEngine

        return VLLMEngine(self.config, self.checkpoint, self.device)

    def generate(self, pieces: list[Prompts], sampling: Sampling) -> list[Rollouts]:
        """Replies to all pieces, sampled in batches of similar prompt length and given back in the same pieces."""
        self._check_awake()
        prompts = Prompts.join(pieces)
        order = prompts.lengths.argsort(stable=True)
        at_once = len(prompts) if self.config.rollout.engine == "vllm" else self.config.engine.rollout_batch  # vLLM lets replies queue
        batches = [prompts.select(rows).trimmed() for rows in order.split(at_once)]
        rollouts = Rollouts.join([self.engine.generate(batch, sampling) for batch in batches]).select(order.argsort())
        sizes = [len(piece) for piece in pieces]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [rollouts.select(slice(start, start + size)).trimmed() for start, size in zip(starts, sizes, strict=True)]

    def reload(self, checkpoint: str) -> None:
        """Sample from other weights of the same shape from now on."""
        self.checkpoint = checkpoint
        if self.config.rollout.engine == "vllm":
            self.engine.reload(checkpoint)  # type: ignore[attr-defined]
            self.arrivals = Arrivals()
        else:
            self.load()

    @off_device
    def load_weights(self, update: WeightUpdate) -> int:
        """Take over a bucket of the policy's weights; returns their version. All buckets of a version must come, in order. A sleeping
        engine takes them where it sleeps: waking for each bucket would move the whole model to the device and back.

        Raises:
            ValueError: this is not the bucket that was due.
        """
        self.arrivals.check(update)
        self.engine.load_weights(unpack(update), update.version if update.last() else None)
        return update.version

    def sleep(self) -> None:
        self.engine.to(torch.device("cpu"))
        self.asleep = True

    def wake(self) -> None:
        self.engine.to(self.device)
        self.asleep = False

    def _check_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("this rollout engine sleeps: whoever lets roles work in turns (placement.sleep) must wake it first")
