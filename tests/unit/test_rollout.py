from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.batch import Prompts, pad_rows
from actors.decoding import LlamaDecoder, ModuleDecoder, decoder, joined, left_padded
from actors.models import LanguageModel, shape_config
from actors.rank import is_off_device
from actors.rollout import Rollout
from actors.rollout_transformers import TransformersEngine, choose, uniforms
from actors.sampling import Sampling
from actors.weight_sync import pack
from actors.worker import RankSpec
from tests.fakes import END, VOCABULARY, floats, quickly, saved_lm, smoke, tiny_lm

SAMPLING = Sampling(temperature=1.0, max_new_tokens=8, seed=3, step=5)


def prompts(count: int, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (count,), generator=generator).tolist()
    tokens, lengths = pad_rows([torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in sizes])
    return Prompts(tokens, lengths, torch.tensor([[10 + n, n % 2] for n in range(count)]))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_lm(), END, torch.device("cpu"), version=7)


def replies(rollouts) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]


def test_a_sample_does_not_depend_on_its_batch_neighbours_or_their_order(engine: TransformersEngine) -> None:
    asked = prompts(12)
    together = engine.generate(asked, SAMPLING)
    assert len({len(reply) for reply in replies(together)}) > 2  # sequences do leave the batch at different times
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = engine.generate(asked.select(order), SAMPLING)
    assert replies(shuffled) == [replies(together)[n] for n in order.tolist()]
    for n in range(12):
        alone = engine.generate(asked.select([n]).trimmed(), SAMPLING)
        assert replies(alone) == [replies(together)[n]]
        torch.testing.assert_close(alone.behaviour[0][alone.mask[0]], together.behaviour[n][together.mask[n]], atol=1e-5, rtol=1e-5)
        assert bool(alone.finished) == bool(together.finished[n])


def test_each_part_of_the_key_gives_another_sample_of_the_same_prompt(engine: TransformersEngine) -> None:
    row = Prompts(torch.tensor([[5, 6, 7]]), torch.tensor([3]), torch.tensor([[1, 0]]))
    first = replies(engine.generate(row, SAMPLING))
    assert first == replies(engine.generate(row, SAMPLING))
    others = [
        engine.generate(Prompts(row.tokens, row.lengths, torch.tensor([[2, 0]])), SAMPLING),
        engine.generate(Prompts(row.tokens, row.lengths, torch.tensor([[1, 1]])), SAMPLING),
        engine.generate(row, Sampling(1.0, 8, 4, 5)),
        engine.generate(row, Sampling(1.0, 8, 3, 6)),
    ]
    assert all(replies(other) != first for other in others)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_log_probs_are_the_policys_at_the_sampling_temperature(engine: TransformersEngine, temperature: float) -> None:
    found = engine.generate(prompts(9), Sampling(temperature, 8, 0, 0))
    with torch.no_grad():
        logprobs, _ = LanguageModel(tiny_lm())(found.tokens, found.mask, temperature)
    torch.testing.assert_close(found.behaviour, logprobs, atol=1e-5, rtol=1e-5)
    assert not found.behaviour[~found.mask].any()


def test_greedy_replies_are_the_argmax_of_whole_forward_passes_without_a_cache(engine: TransformersEngine) -> None:
    asked, lm = prompts(8, seed=4), tiny_lm()
    found = engine.generate(asked, Sampling(0.0, 6, 0, 0))
    for n, reply in enumerate(replies(found)):
        ids = asked.tokens[n, : asked.lengths[n]].tolist()
        wanted: list[int] = []
        while len(wanted) < 6 and END not in wanted:
            with torch.no_grad():
                wanted.append(int(lm(input_ids=torch.tensor([ids + wanted])).logits[0, -1].argmax()))
        assert reply == wanted


def test_rollouts_are_prompt_then_reply_right_padded_with_the_reply_marked(engine: TransformersEngine) -> None:
    asked = prompts(10)
    found = engine.generate(asked, SAMPLING)
    for n in range(10):
        start, stop = int(asked.lengths[n]), int(found.lengths[n])
        assert torch.equal(found.tokens[n, :start], asked.tokens[n, :start])
        assert found.mask[n].nonzero()[:, 0].tolist() == list(range(start, stop))
        assert not found.tokens[n, stop:].any()
        reply = found.tokens[n, start:stop].tolist()
        assert END not in reply[:-1]
        assert bool(found.finished[n]) == (reply[-1] == END)
        assert bool(found.finished[n]) or len(reply) == 8
    assert torch.equal(found.keys, asked.keys)
    assert found.version.tolist() == [7] * 10
    assert found.finished.any()
    assert not found.finished.all()


def test_a_prompt_that_leaves_no_room_is_refused_and_one_that_just_fits_is_not(engine: TransformersEngine) -> None:
    context = smoke().scale.context
    for length, fits in ((context - 8, True), (context - 7, False)):
        asked = Prompts(torch.full((1, length), 3), torch.tensor([length]), torch.tensor([[0, 0]]))
        if fits:
            assert len(replies(engine.generate(asked, SAMPLING))[0]) >= 1
        else:
            with pytest.raises(ValueError, match=rf"{length} tokens.*{context}.*max_new_tokens"):
                engine.generate(asked, SAMPLING)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, -30.0, 1.0]).expand(20_000, 5)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen, logprobs = choose(logits, noise, 0.8)
    wanted = torch.softmax(logits[0] / 0.8, dim=-1)
    share = chosen.bincount(minlength=5) / 20_000
    assert (share - wanted).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    assert share[3] == 0
    torch.testing.assert_close(logprobs, wanted.log()[chosen])


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), width=st.integers(2, 12), temperature=st.floats(0.2, 3))
def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_noise(seed: int, rows: int, width: int, temperature: float) -> None:
    logits, noise = 2 * floats(seed, rows, width), torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen, _ = choose(logits, noise, temperature)
    chances = torch.softmax(logits / temperature, dim=-1)
    for b in range(rows):
        below, token = 0.0, 0
        while below + float(chances[b, token]) <= float(noise[b]) and token < width - 1:
            below += float(chances[b, token])
            token += 1
        assert int(chosen[b]) == token


def test_the_ends_of_the_noise_pick_tokens_that_exist_and_have_a_chance() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, 4)
    chosen, logprobs = choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert chosen.tolist() == [1, 2]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 2)


def test_uniform_numbers_are_a_function_of_the_key_and_the_shorter_row_starts_the_longer() -> None:
    keys = torch.tensor([[4, 0], [4, 1], [5, 0]])
    numbers = uniforms(keys, SAMPLING, 6)
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(uniforms(keys[[2, 0]], SAMPLING, 6), numbers[[2, 0]])
    assert torch.equal(uniforms(keys, SAMPLING, 3), numbers[:, :3])
    assert len({tuple(row) for row in numbers.tolist()}) == 3


def test_left_padding_moves_rows_to_the_right_edge() -> None:
    tokens, attention = left_padded(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]]), torch.tensor([2, 3]), 3)
    assert tokens.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert attention.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_new_weights_change_what_is_sampled_to_what_those_weights_sample() -> None:
    engine = TransformersEngine(tiny_lm(0), END, torch.device("cpu"))
    engine.load_weights(LanguageModel(tiny_lm(1)).state_dict(), 3)
    found = engine.generate(prompts(6), SAMPLING)
    assert replies(found) == replies(TransformersEngine(tiny_lm(1), END, torch.device("cpu")).generate(prompts(6), SAMPLING))
    assert replies(found) != replies(TransformersEngine(tiny_lm(0), END, torch.device("cpu")).generate(prompts(6), SAMPLING))
    assert found.version.tolist() == [3] * 6


def test_weights_of_another_model_are_refused() -> None:
    engine = TransformersEngine(tiny_lm(), END, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.load_weights({"lm.model.norm.weight": torch.ones(16)}, 1)


def test_a_rollout_rank_gives_back_the_pieces_it_was_given_and_takes_packed_weights(tmp_path) -> None:
    rank = Rollout(smoke(), saved_lm(tmp_path), RankSpec("rollout", 0, 1, torch.get_num_threads()))
    rank.load()
    asked = prompts(7)
    pieces = [piece.trimmed() for piece in asked.split(3)]
    found = rank.generate(pieces, [], SAMPLING)
    assert [len(piece) for piece in found] == [3, 3, 1]
    whole = TransformersEngine(tiny_lm(), END, torch.device("cpu")).generate(asked, SAMPLING)
    assert [reply for piece in found for reply in replies(piece)] == replies(whole)
    assert rank.load_weights(pack(LanguageModel(tiny_lm(1)).state_dict(), 4)) == 4
    assert replies(rank.generate([asked], [], SAMPLING)[0]) != replies(whole)


def test_a_sleeping_engine_takes_weights_where_it_sleeps_and_samples_when_it_is_woken(tmp_path) -> None:
    rank = Rollout(smoke(), saved_lm(tmp_path), RankSpec("rollout", 0, 1, torch.get_num_threads()))
    rank.load()
    rank.sleep()
    assert is_off_device(Rollout.load_weights)
    rank.load_weights(pack(LanguageModel(tiny_lm(1)).state_dict(), 4))
    with pytest.raises(RuntimeError, match="sleeps"):
        rank.generate([prompts(6)], [], SAMPLING)
    rank.wake()
    wanted = TransformersEngine(tiny_lm(1), END, torch.device("cpu")).generate(prompts(6), SAMPLING)
    assert replies(rank.generate([prompts(6)], [], SAMPLING)[0]) == replies(wanted)


def shaped(**changes: Any) -> PreTrainedModel:
    """A Llama of another form, its distributions far from uniform."""
    scale = smoke().scale
    shape = shape_config(scale, VOCABULARY, 0.0, END, 0)
    for name, value in changes.items():
        setattr(shape, name, value)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.5) if parameter.dim() > 1 else parameter.normal_(1.0, 0.2)
    return lm


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_key_value_heads": 1}, {"head_dim": 12}, {"tie_word_embeddings": False}, {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    ],
    ids=["plain", "grouped heads", "wide heads", "own head", "epsilon", "angles"],
)  # fmt: skip
def test_llamas_own_steps_give_the_logits_of_whole_passes_while_sequences_leave(changes: dict[str, Any]) -> None:
    lm, asked = shaped(**changes), prompts(7)
    rows = [asked.tokens[n, : asked.lengths[n]].tolist() for n in range(7)]
    batch = decoder(lm)
    assert isinstance(batch, LlamaDecoder)
    with torch.no_grad():
        logits = batch.start(asked, 5)
        for step in range(5):
            wanted = torch.stack([lm(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
            done = torch.tensor([step in (1, 3) and n % 3 == 0 for n in range(len(rows))])
            if step in (1, 3):
                stay = batch.leave(done)
                assert stay is not None
                assert sorted(stay.tolist()) == (~done).nonzero()[:, 0].tolist()
                rows = [rows[n] for n in stay.tolist()]
            tokens = torch.arange(2, 2 + len(rows)) + step
            rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
            if step < 4:
                logits = batch.step(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_what_llamas_own_steps_do_not_compute_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert isinstance(decoder(shaped(**changes)), ModuleDecoder)


def test_both_ways_sample_the_same_replies_with_the_same_log_probs(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine.generate(prompts(12), SAMPLING)
    monkeypatch.setattr("actors.rollout_transformers.decoder", ModuleDecoder)
    module = engine.generate(prompts(12), SAMPLING)
    assert replies(own) == replies(module)
    torch.testing.assert_close(own.behaviour, module.behaviour, atol=1e-5, rtol=1e-5)


def test_weights_that_are_joined_are_still_the_models_own(engine: TransformersEngine) -> None:
    fresh = TransformersEngine(tiny_lm(0), END, torch.device("cpu"))
    fresh.generate(prompts(3), SAMPLING)
    attention = fresh.lm.base_model.layers[0].self_attn
    storages = {module.weight.untyped_storage().data_ptr() for module in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1
    assert joined([attention.q_proj, attention.k_proj, attention.v_proj]).untyped_storage().data_ptr() in storages
    with torch.no_grad():
        attention.k_proj.weight.data = attention.k_proj.weight.data.clone()  # as `Module.to` does
    assert replies(fresh.generate(prompts(6), SAMPLING)) == replies(engine.generate(prompts(6), SAMPLING))
    fresh.load_weights(LanguageModel(tiny_lm(1)).state_dict(), 3)
    assert replies(fresh.generate(prompts(6), SAMPLING)) == replies(
        TransformersEngine(tiny_lm(1), END, torch.device("cpu")).generate(prompts(6), SAMPLING)
    )


@quickly
@given(seed=st.integers(0, 10**6), width=st.integers(60, 200), noise=st.floats(0, 1, exclude_max=True))
def test_summing_by_blocks_draws_the_token_that_summing_everything_draws(seed: int, width: int, noise: float) -> None:
    logits = 3 * floats(seed, 1, width)
    chosen, logprobs = choose(logits, torch.tensor([noise], dtype=torch.float64), 1.0)
    sums = torch.softmax(logits, dim=-1).cumsum(dim=-1)[0]
    below = float(sums[chosen - 1]) if int(chosen) else 0.0
    assert below - 1e-12 <= noise * float(sums[-1]) <= float(sums[chosen]) + 1e-12
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1)[0, chosen])


def test_what_memory_held_before_is_nowhere_in_a_sample(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = replies(engine.generate(prompts(6), SAMPLING))
    plain = torch.empty

    def spoilt(*sizes: Any, **how: Any) -> torch.Tensor:
        return plain(*sizes, **how).fill_(math.nan) if how.get("dtype") is torch.float32 else plain(*sizes, **how)

    monkeypatch.setattr(torch, "empty", spoilt)
    assert replies(engine.generate(prompts(6), SAMPLING)) == wanted


def test_logits_that_are_no_numbers_give_a_token_that_exists() -> None:
    chosen, logprobs = choose(torch.full((2, 70), math.nan), torch.tensor([0.1, 0.9], dtype=torch.float64), 1.0)
    assert ((chosen >= 0) & (chosen < 70)).all() and logprobs.isnan().all()
