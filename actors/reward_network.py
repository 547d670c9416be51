"""A reward model that reads more of the network than its last state: features of context and reply, and a linear head over them.

Reading the last token alone (InstructGPT 2203.02155; models.ScalarModel) asks the network to have gathered there all that it knows of a
reply. A large pretrained one has. A small one that has seen a few thousand judgements does much better when the head is given means over
tokens too, and how likely the language model holds the reply (BENCHMARKS.md). Features are standardised by the training rows, so that one
penalty fits all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.models import ScalarModel, at_last, load_causal_lm, load_scalar_model, positions, save_model

FEATURE_HEAD_FILE = "feature_head.safetensors"
HEAD = ("head.weight", "head.bias", "mean", "spread")
LIKELIHOOD = 6
"""Numbers that the feature `likelihood` is made of."""


class FeatureModel(nn.Module):
    """A causal LM and a linear head over features of rows of context and reply."""

    mean: Tensor
    """[F]: of each feature over the training rows."""
    spread: Tensor
    """[F]: standard deviation likewise."""

    def __init__(self, lm: PreTrainedModel, features: Sequence[str]) -> None:
        """Args:
        features: some of `last`, `reply`, `context`, `likelihood` (`reward_model.features` says what they are).
        """
        super().__init__()
        self.lm, self.features = lm, tuple(features)
        width = feature_count(lm.config, features)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # all scores are equal at first: a loss of ln 2
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, tokens: Tensor, lengths: Tensor, mask: Tensor, read: bool = False) -> Tensor:
        """Scores, [B] float32, or with `read` the features themselves, [B, F].

        Args:
            tokens: [B, T] long, right-padded.
            lengths: [B] long.
            mask: [B, T] bool, the reply's tokens.
        """
        found = self._read(tokens, lengths, mask)
        return found if read else self.head((found - self.mean) / self.spread)[:, 0].float()

    def _read(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        output: Any = self.lm.base_model(
            input_ids=tokens, position_ids=positions(tokens), use_cache=False, output_hidden_states=True
        )  # fmt: skip
        context = (positions(tokens) < lengths[:, None]) & ~mask
        parts: list[Tensor] = []
        for states in output.hidden_states:
            if "last" in self.features:
                parts.append(states[torch.arange(len(lengths)), lengths - 1])
            if "reply" in self.features:
                parts.append(mean_over(states, mask))
            if "context" in self.features:
                parts.append(mean_over(states, context))
        if "likelihood" in self.features:
            parts.append(self._likelihood(output.last_hidden_state, tokens, mask))
        return torch.cat([part.float() for part in parts], dim=-1)

    def _likelihood(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, 6]: the reply's log-probs as sum, mean and least; the sum of log-prob + entropy, which is 0 on average for replies that the
        language model itself would write, whatever their length; mean entropy; number of tokens. Nats."""
        wanted = mask[:, 1:]
        logs = torch.log_softmax(self.lm.get_output_embeddings()(hidden[:, :-1][wanted]).float(), dim=-1)
        chosen = logs.gather(-1, tokens[:, 1:][wanted][:, None])[:, 0]
        empty = torch.zeros(wanted.shape, device=tokens.device)
        logprobs, entropies = empty.masked_scatter(wanted, chosen), empty.masked_scatter(wanted, -(logs.exp() * logs).sum(-1))
        count, total, surprise = wanted.sum(dim=1).clamp(min=1).float(), logprobs.sum(dim=1), entropies.sum(dim=1)
        return torch.stack([total, total / count, logprobs.amin(dim=1), total + surprise, surprise / count, count], dim=-1)


def feature_count(config: Any, features: Sequence[str]) -> int:
    """Numbers that a model of this configuration gives for the features."""
    pooled = sum(name != "likelihood" for name in features)
    return pooled * (config.num_hidden_layers + 1) * config.hidden_size + LIKELIHOOD * ("likelihood" in features)


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d], [B, T] bool -> [B, d]: mean over the mask, 0 where it is empty."""
    weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("btd,bt->bd", states, weights)


def score(run: Any, tokens: Tensor, lengths: Tensor, mask: Tensor, module: nn.Module) -> Tensor:
    """[B]: scores by either kind of reward model, with `run` (the module, or the engine around it) called."""
    if isinstance(module, FeatureModel):
        return run(tokens, lengths, mask)
    return at_last(run(tokens), lengths)


def load_reward_model(path: str, seed: int) -> ScalarModel | FeatureModel:
    """Either kind, as it was saved; from a causal LM's folder a `ScalarModel` with a fresh head."""
    file = Path(path) / FEATURE_HEAD_FILE
    if not file.exists():
        return load_scalar_model(path, seed)
    with safe_open(file, "pt") as head:
        model = FeatureModel(load_causal_lm(path), json.loads(head.metadata()["features"]))
        model.load_state_dict({name: head.get_tensor(name) for name in HEAD}, strict=False)
    return model


def save_network(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write Hugging Face files of any of our networks into `folder`; a `FeatureModel`'s head stands beside its language model.

    Args:
        state: the module's whole state dict, gathered from its ranks.
    """
    if not isinstance(module, FeatureModel):
        save_model(module, state, folder)
        return
    module.lm.save_pretrained(folder, state_dict={n.removeprefix("lm."): tensor for n, tensor in state.items() if n.startswith("lm.")})
    head = {name: state[name].contiguous() for name in HEAD}
    save_file(head, folder / FEATURE_HEAD_FILE, metadata={"features": json.dumps(list(module.features))})
