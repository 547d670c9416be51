"""A service from its settings and the models of its launch: what Serve's replicas and the service in one process have in common."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from actors.serving.protocol import StepEngine
from conf.serving import Serving
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.serving.engine import Engine
from orchestration.serving.launch import ModelSpec
from orchestration.serving.prompts import HiddenPrompt, prompt_of, read_prompts
from orchestration.serving.service import ServedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
DEFAULT_CONTEXT = 2048
"""Of a model whose configuration names no length."""


def load_engine(checkpoint: str, settings: Serving) -> StepEngine:
    """The model, in this process."""
    end = Chat(load_tokenizer(checkpoint, "checkpoint")).end
    if settings.engine.kind == "vllm":
        from actors.serving.vllm_engine import load as load_vllm

        return load_vllm(checkpoint, end, settings.engine)
    from actors.serving.transformers_engine import load as load_transformers

    return load_transformers(checkpoint, end, settings.engine)


def served_models(specs: Sequence[ModelSpec], settings: Serving, engines: dict[str, Engine]) -> dict[str, ServedModel]:
    """Models as requests see them, each with its engine."""
    prompts = read_prompts(settings.prompts, settings.canary_words)
    return {spec.name: _served(spec, engines[spec.name], prompt_of(prompts, spec.name)) for spec in specs}


def _served(spec: ModelSpec, engine: Engine, hidden: HiddenPrompt) -> ServedModel:
    chat = Chat(load_tokenizer(spec.checkpoint, "checkpoint"))
    created = int(Path(spec.checkpoint, "config.json").stat().st_mtime)
    return ServedModel(
        spec.name, chat, context_of(spec.checkpoint), engine, spec.tools, spec.version, tokenizer_of(spec.checkpoint), hidden, created
    )


def context_of(checkpoint: str) -> int:
    """Tokens of prompt and reply together, at most."""
    return int(getattr(AutoConfig.from_pretrained(checkpoint), "max_position_embeddings", None) or DEFAULT_CONTEXT)


def tokenizer_of(checkpoint: str) -> str:
    """A hash of a checkpoint's tokenizer."""
    found = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = Path(checkpoint, name)
        found.update(path.read_bytes() if path.is_file() else b"\0")
    return found.hexdigest()[:16]


def spec_of(plain: dict) -> ModelSpec:
    return ModelSpec(**plain)


def as_plain(specs: Sequence[ModelSpec]) -> list[dict]:
    return [dataclasses.asdict(spec) for spec in specs]
