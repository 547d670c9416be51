"""The chat service: the settings of `serving`, for `chatray serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from conf.moderation import Moderation
from conf.settings import Count, NotNegative, Positive, Settings, Whole

MOST_MESSAGES, MOST_CHOICES = 4096, 128
"""What the forms of requests leave room for."""


@dataclass(frozen=True)
class ServingEngine(Settings):
    """What writes replies."""

    kind: Literal["transformers", "vllm"]
    """`transformers`: no further package, models without sliding windows; requests join and leave a batch between two tokens. `vllm`: a
    paged cache, for GPUs and CPUs."""
    sequences: Count
    """Replies that one replica writes at once, at most; further requests wait."""
    prefill_tokens: Count
    """Tokens of new prompts that are read between two steps of the replies under way; a longer prompt is read alone (transformers)."""
    dtype: Literal["fp32", "bf16"]
    """Arithmetic of the served model."""
    threads: Count
    """Threads of a replica's CPU arithmetic."""
    interval_ms: Annotated[float, Ge(0), Le(50)]
    """Tokens leave the replica together, at most this often after the first; 0: each as soon as it is written."""
    gpu_memory: Annotated[float, Gt(0), Le(1)]
    """Share of a GPU's memory for weights and key-value cache (vLLM)."""
    cpu_cache_gib: Positive
    """Key-value cache without a GPU, GiB (vLLM)."""
    eager: bool | None
    """Run the model as it is instead of captured or compiled; null: eager without a GPU (vLLM)."""


@dataclass(frozen=True)
class Replicas(Settings):
    """How many processes of one kind there are, and what each reserves of the cluster."""

    least: Count
    """Replicas there always are."""
    most: Count
    """Replicas there are at most; above `least` Serve adds and removes them by load."""
    target: Positive
    """Requests under way per replica that Serve scales towards."""
    cpus: NotNegative
    """CPUs that Ray reserves for each."""
    gpus: NotNegative
    """GPUs that Ray reserves for each; 0: it computes on the CPU, and sees no GPU of its machine."""


@dataclass(frozen=True)
class Limits(Settings):
    """What a request may ask for; above it the answer is an error of status 400, 413 or 429."""

    body_bytes: Count
    """Size of a request's body. It may have 32,768 objects, lists and named fields, and 131,072 values; above 1 MiB more in proportion."""
    messages: Annotated[int, Ge(1), Le(MOST_MESSAGES)]
    """Messages of a request, or turns kept of a conversation."""
    characters: Count
    """Characters of all its texts together, or of those kept of a conversation."""
    choices: Annotated[int, Ge(1), Le(MOST_CHOICES)]
    """Replies to one request (`n`), or prompts times `n` in `/v1/completions`."""
    new_tokens: Count
    """Longest reply, tokens. Log-probs are told of as many as one such reply has with 20 alternatives, over all choices."""
    default_tokens: Count
    """Longest reply where the request does not say; what the context leaves if that is less."""
    seconds: Positive
    """Time for a whole reply; what is written by then ends with an error."""
    ongoing: Count
    """Requests at work or waiting in one ingress; one more is answered with 429."""
    waiting: Count
    """Requests waiting for an engine replica; one more is answered with 503."""
    requests_per_minute: Whole
    """Requests of each API key in a minute, where its entry says nothing else; 0: no limit."""
    tokens_per_day: Whole
    """Prompt and reply tokens of each API key in 24 hours, where its entry says nothing else; 0: no limit."""


@dataclass(frozen=True)
class Serving(Settings):
    """The service as a whole."""

    host: str
    """Address that is listened on. Another than a loopback address needs `serving.keys`."""
    port: Annotated[int, Ge(0), Le(65535)]
    """Port; 0: a free one."""
    model: str | None
    """Name of the model in the API; null: the run's, or the checkpoint folder's."""
    tools: Literal["auto", "taskmaster", "none"]
    """How the model writes tool calls: `taskmaster` as `call NAME {json}`. `auto`: so, if the run's data has them."""
    keys: str | None
    """YAML file of API keys, as `chatray key` writes it: name, SHA-256 of the key, limits. null: no keys, on loopback only."""
    prompts: str | None
    """YAML file of hidden prompts by model: version, before, after (README). Its texts never appear in settings, answers or logs."""
    canary_words: Annotated[int, Ge(2)]
    """As many words of a hidden prompt in a row end a reply; fewer pass."""
    store: str
    """URL of the database of conversations and audit records: SQLite or PostgreSQL, as SQLAlchemy writes it."""
    moderation: Moderation
    """Who judges texts, and what is done."""
    refusal: str
    """The assistant's answer where input or output is blocked."""
    flush_ms: Annotated[float, Ge(0), Le(1000)]
    """How long a text may wait for the rest of its last word before it is checked and sent, milliseconds."""
    log_prompts: bool
    """Write the client's own texts to the log. Hidden prompts, keys and headers are never written."""
    haproxy: bool | None
    """HAProxy in place of Serve's Python proxy, and gRPC between replicas: more throughput with many streams. null: where Ray's package for
    it is installed (Linux). For the cluster that `chatray serve` starts itself: nodes of another one need the variables that the README
    names, and `runtime=local` has neither."""
    page: bool
    """The chat page at `/`. Its state is in the process that sent it, so it needs `ingress.most=1`."""
    cors: tuple[str, ...]
    """Origins of pages that may call the API from a browser; []: none but the service's own page."""
    drain_seconds: Positive
    """How long a replica that is stopped goes on with the replies under way."""
    revision: Whole
    """A number to raise when a file that is named here (prompts, keys, checkpoint) has new content: replicas then read it again."""
    engine: ServingEngine
    """What writes replies."""
    limits: Limits
    """What a request may ask for."""
    ingress: Replicas
    """Replicas that speak HTTP."""
    engines: Replicas
    """Replicas that hold a model."""
    moderators: Replicas
    """Replicas that judge texts."""
