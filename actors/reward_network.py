"""A reward model that reads more than the network's last state: features of context and reply, and a linear head over them.

Reading the last token alone (InstructGPT 2203.02155; models.ScalarModel) asks the network to have gathered there all that it knows of a
reply. A large pretrained one has. With a small one and a few thousand judgements a head that is given what the language model thinks of
each token of the reply, and which tokens are there, is much better (BENCHMARKS.md).

Every group of features weighs the same: dense ones are standardised and divided by the root of their number, token counts are weighted by
rarity and have norm 1 per row, so one L2 penalty fits all of them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.attention import read_all
from actors.models import ScalarModel, at_last, load_causal_lm, load_scalar_model, positions, write_model
from actors.weights import Gather, gather_from, plain_weights, save_tensors, save_transformer, under

FEATURE_HEAD_FILE = "feature_head.safetensors"
HEAD = ("head.weight", "head.bias", "mean", "spread")
LIKELIHOOD = 22
"""Numbers that `likelihood` is made of."""
BUCKETS = 4096
"""Into which tokens, and groups of neighbouring tokens, are hashed; collisions are rare (Weinberger et al. 0902.2206)."""
BAGS, NGRAMS = 3, 3
"""Bags of n-grams of up to three tokens: of the reply, of the context, and of what the reply has and the context has not."""
PRIMES = (1, 7919, 104729)


class FeatureModel(nn.Module):
    """A causal LM and a linear head over features of rows of context and reply."""

    mean: Tensor
    """[F]."""
    spread: Tensor
    """[F]: features are used as (x - mean) / spread."""

    def __init__(self, lm: PreTrainedModel, features: Sequence[str]) -> None:
        """Args:
        features: some of `last`, `reply`, `context`, `likelihood`, `tokens` (`reward_model.features` says what they are).
        """
        super().__init__()
        self.lm, self.features = lm, tuple(features)
        width = sum(widths(lm.config, self.features).values())
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # all scores are equal at first: a loss of ln 2
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, tokens: Tensor, lengths: Tensor, mask: Tensor, read: bool = False) -> Tensor:
        """Scores, [B] float32, or with `read` the features as they are, [B, F].

        Args:
            tokens: [B, T] long, right-padded.
            lengths: [B] long.
            mask: [B, T] bool, the reply's tokens.
        """
        found = self._read(tokens, lengths, mask)
        if read:
            return found
        with torch.autocast(found.device.type, enabled=False):  # in the head's own precision: its bias is where the zero is
            return self.head(self.scaled(found).to(self.head.weight.dtype))[:, 0].float()

    def scaled(self, features: Tensor) -> Tensor:
        """[B, F] as read -> [B, F] as the head takes them."""
        return scaled(features, self.mean, self.spread, widths(self.lm.config, self.features))

    def _read(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        # with tokens alone, nothing of the network is asked for
        layers = [] if self.features == ("tokens",) else read_all(self.lm.base_model, tokens, lengths)
        context = (positions(tokens) < lengths[:, None]) & ~mask
        every = torch.arange(len(lengths), device=lengths.device)
        read: dict[str, Callable[[], Tensor]] = {
            "last": lambda: torch.cat([states[every, lengths - 1] for states in layers], dim=-1),
            "reply": lambda: torch.cat([mean_over(states, mask) for states in layers], dim=-1),
            "context": lambda: torch.cat([mean_over(states, context) for states in layers], dim=-1),
            "likelihood": lambda: self._likelihood(layers[-1], tokens, mask),
            "tokens": lambda: said(tokens, mask, context),
        }
        return torch.cat([read[name]().float() for name in self.features], dim=-1)

    def _likelihood(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        wanted = mask[:, 1:]
        logits = self.lm.get_output_embeddings()(hidden[:, :-1][wanted]).float()
        return likelihood(logits, tokens[:, 1:][wanted], wanted)


def widths(config: Any, features: Sequence[str]) -> dict[str, int]:
    """How many numbers a model of this configuration gives for each group of features."""
    states = (config.num_hidden_layers + 1) * config.hidden_size
    return {name: {"likelihood": LIKELIHOOD, "tokens": BAGS * NGRAMS * BUCKETS}.get(name, states) for name in features}


def likelihood(logits: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """What a language model thinks of a reply, token by token, in 22 numbers; each as sign(x) log(1 + |x|), since some are long-tailed.

    Log-prob + entropy is 0 on average in replies that the model itself would write, whatever their length; the regret of a token is how
    much likelier the likeliest token was.

    Args:
        logits: [n, V] for the n reply tokens of all rows.
        chosen: [n] long, the tokens that are there.
        mask: [B, T] bool with n true entries: where in its row each of them stands.

    Returns:
        [B, 22].
    """
    logs = torch.log_softmax(logits, dim=-1)
    picked = logs.gather(-1, chosen[:, None])[:, 0]

    def rows(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)

    logprob, entropy, regret = rows(picked), rows(-(logs.exp() * logs).sum(-1)), rows(logs.amax(dim=-1) - picked)
    rank = rows(torch.log1p((logs > picked[:, None]).sum(-1).float()))
    sure = rows(logs.exp().square().sum(-1))
    count = mask.sum(dim=1).clamp(min=1).float()
    place = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, place, mask.shape[1] - 1).amin(dim=1, keepdim=True)
    found = [
        *(total for values in (logprob, logprob + entropy, entropy, regret) for total in (values.sum(dim=1), values.sum(dim=1) / count)),
        *_most(-logprob, 3), *_most(regret, 3),
        *((logprob < -limit).sum(dim=1).float() for limit in (1, 3, 5)),
        rank.sum(dim=1), rank.amax(dim=1), sure.sum(dim=1) / count, count,
        logprob.gather(1, first)[:, 0],
    ]  # fmt: skip
    numbers = torch.stack(found, dim=-1)
    return numbers.sign() * numbers.abs().log1p()


def _most(values: Tensor, count: int) -> list[Tensor]:
    """The `count` largest numbers of each row, none of them negative, 0 where there are fewer."""
    padded = torch.nn.functional.pad(values, (0, count))
    return list(padded.topk(count, dim=1).values.unbind(dim=1))


def said(tokens: Tensor, reply: Tensor, context: Tensor) -> Tensor:
    """[B, BAGS NGRAMS BUCKETS]: log counts of the n-grams of the reply, of the context, and of the reply that the context has not."""
    replied, given = counted(tokens, reply), counted(tokens, context)
    return torch.cat([replied, given, torch.where(given > 0, 0.0, replied)], dim=-1).log1p()


def counted(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, NGRAMS BUCKETS]: how often each token, and each two and three neighbouring tokens, stand in the mask, by bucket."""
    found = torch.zeros(len(tokens), NGRAMS * BUCKETS, device=tokens.device)
    hashed, inside = torch.zeros_like(tokens), torch.ones_like(mask)
    for n in range(min(NGRAMS, tokens.shape[1])):  # the hash and the mask of the n + 1 tokens from each place on
        width = tokens.shape[1] - n
        hashed = hashed[:, :width] + tokens[:, n:] * PRIMES[n]
        inside = inside[:, :width] & mask[:, n:]
        found.scatter_add_(1, hashed % BUCKETS + n * BUCKETS, inside.float())
    return found


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d], [B, T] bool -> [B, d]: mean over the mask, 0 where it is empty."""
    weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("btd,bt->bd", states, weights)


def statistics(features: Tensor, groups: dict[str, int]) -> tuple[Tensor, Tensor]:
    """(mean, spread) to scale features by, from those of the training rows, [N, F].

    Dense groups: mean, and standard deviation times the root of the group's width. Token counts: 0, and one over the smoothed inverse
    document frequency ln(N / (1 + rows that have it)) + 1.
    """
    means, spreads = [], []
    for part, name in zip(features.split(list(groups.values()), dim=1), groups, strict=True):
        if name == "tokens":
            rarity = torch.log(len(part) / (1 + (part > 0).sum(dim=0))) + 1
            means.append(torch.zeros(part.shape[1]))
            spreads.append(1 / rarity.clamp(min=0.1))
        else:
            spread = part.std(dim=0, correction=0)
            means.append(part.mean(dim=0))
            spreads.append(torch.where(spread > 1e-6, spread, torch.ones_like(spread)) * math.sqrt(part.shape[1]))
    return torch.cat(means), torch.cat(spreads)


def scaled(features: Tensor, mean: Tensor, spread: Tensor, groups: dict[str, int]) -> Tensor:
    """[N, F] features as the head takes them; those of `tokens` have norm 1 in each of their bags."""
    parts = ((features - mean) / spread).split(list(groups.values()), dim=1)
    return torch.cat([_of_norm_one(part) if name == "tokens" else part for part, name in zip(parts, groups, strict=True)], dim=1)


def _of_norm_one(part: Tensor) -> Tensor:
    bags = part.view(len(part), BAGS, -1)
    return torch.nn.functional.normalize(bags, dim=-1).reshape(part.shape)


def score(run: Any, tokens: Tensor, lengths: Tensor, mask: Tensor, module: nn.Module) -> Tensor:
    """[B]: scores by either kind of reward model, with `run` (the module, or the engine around it) called."""
    if isinstance(module, FeatureModel):
        return run(tokens, lengths, mask)
    return at_last(run(tokens, lengths), lengths)


def load_reward_model(path: str, seed: int, unfilled: bool = False) -> ScalarModel | FeatureModel:
    """Either kind, as it was saved; from a causal LM's folder a `ScalarModel` with a fresh head. `unfilled` as in `load_causal_lm`."""
    file = Path(path) / FEATURE_HEAD_FILE
    if not file.exists():
        return load_scalar_model(path, seed, unfilled)
    with safe_open(file, "pt") as head:
        model = FeatureModel(load_causal_lm(path, unfilled=unfilled), json.loads(head.metadata()["features"]))
        model.load_state_dict({name: head.get_tensor(name) for name in HEAD}, strict=False)
    return model


def save_network(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write Hugging Face files of any of our networks into `folder`, from a state dict that is whole."""
    write_network(module, gather_from(state), folder, sys.maxsize)


def write_network(module: nn.Module, gather: Gather, folder: Path | None, limit: int) -> None:
    """Write Hugging Face files of any of our networks, as `write_model` does; a `FeatureModel`'s head stands beside its language model."""
    if not isinstance(module, FeatureModel):
        write_model(module, gather, folder, limit)
        return
    weights = plain_weights(module)
    save_transformer(module.lm, under("lm.", weights), gather, folder, limit)
    head, features = {name: weights[name] for name in HEAD}, {"features": json.dumps(list(module.features))}
    save_tensors(head, gather, folder / FEATURE_HEAD_FILE if folder else None, features)
