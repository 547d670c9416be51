"""The rollout role: it samples replies with an engine, from the weights that it was sent last."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.batch import Prompts, Rollouts
from actors.devices import own_device
from actors.models import load_causal_lm
from actors.precision import computes_in_bf16
from actors.rank import off_device
from actors.rollout_transformers import TransformersEngine
from actors.routes import endpoint
from actors.sampling import Queueing, RolloutEngine, Sampling
from actors.staging import staged
from actors.stream import Endpoint, Route, receive_all, total_bytes
from actors.weight_sync import BUCKET_BYTES, Arrivals, WeightUpdate, unpack
from actors.weights import Weight
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
        self.device = own_device()
        self.engine: RolloutEngine = self._vllm() if self.config.rollout.engine == "vllm" else self._transformers()
        self.asleep = False
        self.counted: list[int] = []
        self.arrivals = Arrivals()

    def _transformers(self) -> RolloutEngine:
        lm = load_causal_lm(self.checkpoint)
        end = lm.generation_config.eos_token_id
        end = int(end[0] if isinstance(end, list) else end)  # chat models may list several; the first is the turn's end
        if self.config.dtype() == "bf16" and computes_in_bf16(self.device.type):
            lm.bfloat16()
        return TransformersEngine(lm, end, self.device)

    def _vllm(self) -> VLLMEngine:
        from actors.rollout_vllm import VLLMEngine

        return VLLMEngine(self.config, self.checkpoint, self.device)

    def generate(self, pieces: list[Prompts], coming: list[Prompts], sampling: Sampling, first: bool = True) -> list[Rollouts]:
        """Replies to all pieces, sampled in batches of similar prompt length and given back in the same pieces.

        Args:
            coming: what the next calls will ask for, which an engine that adds to its batch while it works begins with meanwhile.
            first: whether this begins a batch of the loop's; other calls go on with it.
        """
        self._check_awake()
        prompts = Prompts.join(pieces)
        if coming and isinstance(self.engine, Queueing):
            self.engine.expect(Prompts.join([*pieces, *coming]), sampling)
        order = prompts.lengths.argsort(stable=True)
        at_once = len(prompts) if self.config.rollout.engine == "vllm" else self.config.engine.rollout_batch  # vLLM lets replies queue
        batches = [prompts.select(rows).trimmed() for rows in order.split(at_once)]
        rollouts = Rollouts.join([self.engine.generate(batch, sampling) for batch in batches]).select(order.argsort())
        sizes = [len(piece) for piece in pieces]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        found = [rollouts.select(slice(start, start + size)).trimmed() for start, size in zip(starts, sizes, strict=True)]
        self.counted = ([] if first else self.counted) + [int(piece.lengths.sum()) for piece in found]
        return found

    @off_device
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each piece of the last batch, prompts and replies."""
        return tuple(self.counted)  # a list would be one result for each piece

    def reload(self, checkpoint: str) -> None:
        """Sample from other weights of the same shape from now on."""
        self.checkpoint = staged(checkpoint, self.config.engine.stage_folder)
        if self.config.rollout.engine == "vllm":
            self.engine.reload(self.checkpoint)  # type: ignore[attr-defined]
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

    @off_device
    def receive_weights(self, version: int, route: Route, table: dict[str, Weight]) -> int:
        """Take over all of the policy's weights while it sends them; returns their version. A sleeping engine takes them where it sleeps.

        Raises:
            WeightSyncError: the policy died, or stood still for `route.seconds`.
        """
        stream = self.ends.receiver(route, self.spec.rank, version, total_bytes(table))
        try:
            receive_all(table, stream, self._places(), functools.partial(self._load, version), BUCKET_BYTES)
        finally:
            stream.close()
        return version

    @off_device
    def endpoint(self) -> Endpoint:
        return endpoint(on_device=bool(self._places()) and not self.config.placement.sleep)

    def _load(self, version: int, ready: dict[str, Tensor], last: bool) -> None:
        self.engine.load_weights(ready, version if last else None)

    def _places(self) -> dict[str, Tensor]:
        """Of an engine that has its weights as the policy has them; others take whole tensors."""
        return self.engine.places() if hasattr(self.engine, "places") else {}

    def sleep(self) -> None:
        self.engine.to(torch.device("cpu"))
        self.asleep = True

    def wake(self) -> None:
        self.engine.to(self.device)
        self.asleep = False

    def _check_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("this rollout engine sleeps: whoever lets roles work in turns (placement.sleep) must wake it first")
