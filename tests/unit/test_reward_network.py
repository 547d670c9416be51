"""What a feature model reads, against loops over rows and dictionaries; how it is scaled, saved and loaded."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.critic import Critic
from actors.models import LanguageModel, ScalarModel
from actors.reward_network import (
    BAGS,
    BUCKETS,
    LIKELIHOOD,
    NGRAMS,
    PRIMES,
    FeatureModel,
    counted,
    likelihood,
    load_reward_model,
    said,
    save_network,
    scaled,
    statistics,
    widths,
)
from actors.worker import RankSpec, process_group_of_one
from tests.fakes import VOCABULARY, floats, mask_with_gaps, rollouts, saved_lm, saved_scalar, sequences, smoke, tiny_lm

EVERY = ("last", "reply", "context", "likelihood", "tokens")


def feature_model(seed: int = 0, features: tuple[str, ...] = EVERY) -> FeatureModel:
    """With a head and a scale that are not those of a new one."""
    model = FeatureModel(tiny_lm(seed), features).eval()
    width = model.head.in_features
    with torch.no_grad():
        model.head.weight.copy_(floats(seed + 1, 1, width))
        model.head.bias.fill_(0.7)
        model.mean.copy_(0.1 * floats(seed + 2, width))
        model.spread.copy_(1 + floats(seed + 3, width).square())
    return model


def naive_likelihood(logits: list[list[float]], chosen: list[int]) -> list[float]:
    """The numbers of one row."""
    logprobs, entropies, regrets, ranks, sure = [], [], [], [], []
    for row, token in zip(logits, chosen, strict=True):
        total = math.log(sum(math.exp(x) for x in row))
        logs = [x - total for x in row]
        logprobs.append(logs[token])
        entropies.append(-sum(math.exp(x) * x for x in logs))
        regrets.append(max(logs) - logs[token])
        ranks.append(math.log1p(sum(x > logs[token] for x in logs)))
        sure.append(sum(math.exp(x) ** 2 for x in logs))
    count = max(len(chosen), 1)
    found: list[float] = []
    for values in (logprobs, [a + b for a, b in zip(logprobs, entropies, strict=True)], entropies, regrets):
        found += [sum(values), sum(values) / count]
    for values in ([-x for x in logprobs], regrets):
        found += [*sorted(values, reverse=True), 0.0, 0.0, 0.0][:3]
    found += [sum(x < -limit for x in logprobs) for limit in (1, 3, 5)]
    found += [sum(ranks), max(ranks, default=0.0), sum(sure) / count, float(count), (logprobs or [0.0])[0]]
    return [math.copysign(math.log1p(abs(x)), x) for x in found]


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_is_that_of_a_loop_over_rows(seed: int) -> None:
    mask = mask_with_gaps(seed, 5, 7, share=0.4)
    mask[1], mask[2] = False, torch.arange(7) == 6  # a row without a reply, and one of a single token at the end
    logits = 3 * floats(seed, int(mask.sum()), 11, dtype=torch.float32)
    chosen = torch.randint(0, 11, (len(logits),), generator=torch.Generator().manual_seed(seed))
    found, start = likelihood(logits, chosen, mask), 0
    assert found.shape == (5, LIKELIHOOD)
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        part = slice(start, start + count)
        wanted = naive_likelihood(logits[part].tolist(), chosen[part].tolist())
        torch.testing.assert_close(found[row], torch.tensor(wanted), atol=1e-4, rtol=1e-4)
        start += count


def test_likelihood_reads_what_the_language_model_gives() -> None:
    tokens, lengths, mask = sequences(4, 5)
    model = FeatureModel(tiny_lm(), ("likelihood",)).eval()
    with torch.no_grad():
        found = model(tokens, lengths, mask, read=True)
        logprobs, entropy = LanguageModel(tiny_lm())(tokens, mask)
    torch.testing.assert_close(found[:, 0], -(-logprobs.sum(dim=1)).log1p(), atol=1e-4, rtol=1e-4)
    surprise = (logprobs + entropy).sum(dim=1)
    torch.testing.assert_close(found[:, 2], surprise.sign() * surprise.abs().log1p(), atol=1e-4, rtol=1e-4)


def naive_counts(tokens: list[int], mask: list[bool]) -> Counter[tuple[int, ...]]:
    """Groups of one to three neighbours that all stand in the mask."""
    return Counter(
        tuple(tokens[at : at + n]) for n in range(1, NGRAMS + 1) for at in range(len(tokens) - n + 1) if all(mask[at : at + n])
    )  # fmt: skip


def bucket(ngram: tuple[int, ...]) -> int:
    return sum(token * prime for token, prime in zip(ngram, PRIMES, strict=False)) % BUCKETS + (len(ngram) - 1) * BUCKETS


def in_buckets(counts: Counter[tuple[int, ...]]) -> Tensor:
    found = torch.zeros(NGRAMS * BUCKETS)
    for ngram, count in counts.items():
        found[bucket(ngram)] += count
    return found


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_counts_are_those_of_a_dictionary_of_neighbours_inside_the_mask(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens, mask = torch.randint(0, 5, (4, width), generator=generator), mask_with_gaps(width, 4, width, share=0.7, at_least=0)
    mask[0], mask[1] = True, False
    for row, found in enumerate(counted(tokens, mask)):
        assert torch.equal(found, in_buckets(naive_counts(tokens[row].tolist(), mask[row].tolist())))


def test_what_is_said_is_the_reply_the_context_and_what_the_reply_alone_has() -> None:
    tokens, lengths, _ = sequences(8, 4, shortest=6, longest=14)
    tokens = tokens % 6 + 2  # repeats, in the row and between context and reply
    places = torch.arange(tokens.shape[1])[None, :]
    reply = (places >= lengths[:, None] - 3) & (places < lengths[:, None])
    context = (places < lengths[:, None]) & ~reply
    for row, found in enumerate(said(tokens, reply, context)):
        of_reply, of_context = (naive_counts(tokens[row].tolist(), mask[row].tolist()) for mask in (reply, context))
        alone = Counter({ngram: count for ngram, count in of_reply.items() if ngram not in of_context})
        assert alone != of_reply
        bags = [in_buckets(counts).log1p() for counts in (of_reply, of_context, alone)]
        torch.testing.assert_close(found, torch.cat(bags))


def test_dense_features_weigh_the_same_whatever_their_number_and_counts_are_weighted_by_rarity() -> None:
    groups = {"likelihood": 4, "reply": 7, "tokens": 6}
    features = 3 + 5 * floats(0, 9, 17, dtype=torch.float32)
    features[:, 5] = 2.5  # says nothing
    features[:, 11:] = torch.tensor([[2, 0, 0, 1, 0, 0]] * 3 + [[1, 1, 0, 0, 0, 0]] * 5 + [[0, 0, 0, 0, 3, 0]]).float()
    mean, spread = statistics(features, groups)
    found = scaled(features, mean, spread, groups)
    for part in (found[:, :4], found[:, 4:11]):
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(part.shape[1]), atol=1e-5, rtol=0)
    assert float(found[:, :4].square().sum(dim=1).mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(found[:, 4:11].square().sum(dim=1).mean()) == pytest.approx(6 / 7, abs=1e-5)
    rarity = [math.log(9 / (1 + rows)) + 1 for rows in (8, 5, 0, 3, 1, 0)]
    torch.testing.assert_close(1 / spread[11:], torch.tensor(rarity))
    first = torch.tensor([2 * rarity[0], 0.0])  # bags of two columns each here
    torch.testing.assert_close(found[0, 11:13], first / first.norm())
    torch.testing.assert_close(found[4, 11:13], torch.tensor(rarity[:2]) / math.hypot(*rarity[:2]))
    assert found[0, 13:15].tolist() == [0.0, 1.0] and not found[8, 11:15].any()
    assert found.shape[1] == sum(groups.values()) and BAGS == 3


def test_widths_are_those_that_are_read() -> None:
    tokens, lengths, mask = sequences(2, 3)
    for name, width in widths(tiny_lm().config, EVERY).items():
        with torch.no_grad():
            assert FeatureModel(tiny_lm(), (name,)).eval()(tokens, lengths, mask, read=True).shape == (3, width)


def test_states_are_read_after_the_last_token_and_as_means_over_reply_and_context() -> None:
    tokens, lengths, mask = sequences(3, 4)
    mask[1] = False
    model = FeatureModel(tiny_lm(), ("last", "reply", "context")).eval()
    with torch.no_grad():
        found = model(tokens, lengths, mask, read=True)
        for row in range(4):
            length = int(lengths[row])
            layers = tiny_lm().base_model(input_ids=tokens[row : row + 1, :length], output_hidden_states=True).hidden_states
            states, reply = torch.cat([layer[0] for layer in layers], dim=1), mask[row, :length]
            means = [part.mean(dim=0) if len(part) else torch.zeros(states.shape[1]) for part in (states[reply], states[~reply])]
            torch.testing.assert_close(found[row], torch.cat([states[-1], *means]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", [EVERY, *((name,) for name in EVERY)], ids=lambda names: "+".join(names))
def test_padding_and_neighbours_change_no_score(features: tuple[str, ...]) -> None:
    rows, model = rollouts(3, 6), feature_model(features=features)
    with torch.no_grad():
        together = model(rows.tokens, rows.lengths, rows.mask)
        wide, more = torch.nn.functional.pad(rows.tokens, (0, 5), value=7), torch.nn.functional.pad(rows.mask, (0, 5))
        wide[torch.arange(wide.shape[1])[None, :] >= rows.lengths[:, None]] = 7
        torch.testing.assert_close(model(wide, rows.lengths, more), together, atol=1e-4, rtol=1e-4)
        for n in range(6):
            row = rows.select([n]).trimmed()
            torch.testing.assert_close(model(row.tokens, row.lengths, row.mask), together[n : n + 1], atol=1e-4, rtol=1e-4)
    assert len({round(score, 4) for score in together.tolist()}) == 6


def test_a_new_head_gives_every_reply_its_bias_and_bfloat16_weights_score_too() -> None:
    tokens, lengths, mask = sequences(5, 4)
    with torch.no_grad():
        assert FeatureModel(tiny_lm(), EVERY)(tokens, lengths, mask).tolist() == [0.0] * 4
        model = feature_model(features=("reply", "likelihood"))
        wanted = model(tokens, lengths, mask)
        found = model.to(torch.bfloat16)(tokens, lengths, mask)  # as a frozen replica on a GPU
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.3, rtol=0.1)


def test_autocast_leaves_the_head_in_its_own_precision() -> None:
    tokens, lengths, mask = sequences(5, 4)
    model = feature_model(features=("tokens",))
    with torch.no_grad():
        wanted = model(tokens, lengths, mask)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(tokens, lengths, mask), wanted, atol=1e-6, rtol=1e-6)


def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = feature_model(6, ("tokens", "likelihood"))
    save_network(model, model.state_dict(), tmp_path)
    again = load_reward_model(str(tmp_path), seed=9)
    assert isinstance(again, FeatureModel) and again.features == ("tokens", "likelihood")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    rows = sequences(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*rows), model(*rows), atol=1e-6, rtol=1e-6)


def test_a_folder_is_loaded_as_the_kind_that_it_holds(tmp_path: Path) -> None:
    scalar, fresh = load_reward_model(saved_scalar(tmp_path / "scalar"), 3), load_reward_model(saved_lm(tmp_path / "lm"), 3)
    assert isinstance(scalar, ScalarModel) and isinstance(fresh, ScalarModel)
    assert not torch.equal(scalar.head.weight, fresh.head.weight)
    assert torch.equal(fresh.head.weight, load_reward_model(str(tmp_path / "lm"), 3).head.weight)


def test_the_critic_starts_from_a_feature_models_language_model(tmp_path: Path) -> None:
    process_group_of_one()
    model = feature_model(6)
    save_network(model, model.state_dict(), tmp_path)
    critic = Critic(smoke(), str(tmp_path), RankSpec("critic", 0, 1, 1))
    critic.load()
    assert isinstance(critic.engine.module, ScalarModel)
    for name, tensor in critic.engine.module.backbone.state_dict().items():
        assert torch.equal(tensor, model.lm.base_model.state_dict()[name])
    (values,) = critic.values([rollouts(1, 3)])
    assert bool(values.isfinite().all()) and bool(values.any()) and model.lm.config.vocab_size == VOCABULARY
