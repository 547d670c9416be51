"""vLLM as the rollout engine, for real, beside the transformers engine on the same weights.

Not collected by its name: `test_vllm.py` runs it in a process of its own, since vLLM takes the process group of the one that it is in.

    python -m pytest tests/integration/vllm_engine.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors import rollout_vllm
from actors.batch import Prompts, Rollouts, pad_rows
from actors.models import LanguageModel, load_causal_lm, new_causal_lm, save_model
from actors.rollout_transformers import TransformersEngine
from actors.rollout_vllm import VLLMEngine
from actors.sampling import Sampling
from actors.weights import grouped, plain_weights
from orchestration import config as configuration
from tests.fakes import floats

rollout_vllm.PASS_TOKENS = 64  # the models' context: eight prompts at once need several passes
VOCABULARY, END, PAD = 120, 1, 0
GREEDY, SAMPLED = Sampling(0.0, 12, 0, 0), Sampling(1.0, 12, 3, 5)
SYNCS = 10
SHAPES = {
    "llama": ["scale.architecture=llama"],
    "opt": ["scale.architecture=opt"],
    "opt-350m": ["scale.architecture=opt", "scale.embedding=32", "scale.post_layer_norm=true"],
}
pytestmark = pytest.mark.usefixtures("vllm")


class Pair:
    """Both engines with the same weights, and the policy that these come from."""

    def __init__(self, folder: Path, shape: str) -> None:
        words = ["experiment=smoke", "rollout=vllm", "rollout.cpu_cache_gib=0.06", "rollout.sequences=8", "model.dtype=fp32",
                 "scale.width=64", "scale.heads=2", "scale.context=64", *SHAPES[shape]]  # fmt: skip
        config = configuration.load(words, folder)
        self.policy = LanguageModel(new_causal_lm(config.scale, VOCABULARY, 0, 0.0, END, PAD).eval())
        self.change(1.0)
        save_model(self.policy, self.policy.state_dict(), folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vllm = VLLMEngine(config, str(folder), device)
        self.plain = TransformersEngine(load_causal_lm(str(folder)), END, device)

    @torch.no_grad()
    def change(self, seed: float) -> None:
        for n, parameter in enumerate(self.policy.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(0.3 * floats(int(1000 * seed) + n, *parameter.shape, dtype=torch.float32))
            else:
                parameter.add_(0.1 * floats(int(1000 * seed) + n, *parameter.shape, dtype=torch.float32))

    def sync(self, version: int) -> None:
        """In buckets so small that they cut a layer's fused weights in two."""
        weights, state = plain_weights(self.policy), self.policy.state_dict()
        buckets = grouped(weights, 20_000)
        assert len(buckets) > 3
        for number, names in enumerate(buckets):
            bucket = {name: state[name].clone() for name in names}
            for engine in (self.vllm, self.plain):
                engine.load_weights(bucket, version if number == len(buckets) - 1 else None)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


def prompts(count: int = 20) -> Prompts:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 9, (count,), generator=generator).tolist()
    tokens, lengths = pad_rows([torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in sizes])
    return Prompts(tokens, lengths, torch.tensor([[10 + n, n % 2] for n in range(count)]))


def replies(rollouts: Rollouts) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]


def test_after_each_of_ten_syncs_both_engines_say_the_same_and_not_what_they_said_before(pair: Pair) -> None:
    before: list[list[int]] = []
    for version in range(1, SYNCS + 1):
        pair.change(version)
        pair.sync(version)
        found, wanted = pair.vllm.generate(prompts(), GREEDY), pair.plain.generate(prompts(), GREEDY)
        assert replies(found) == replies(wanted)
        torch.testing.assert_close(found.behaviour, wanted.behaviour, atol=1e-3, rtol=0)
        assert torch.equal(found.finished, wanted.finished) and torch.equal(found.lengths, wanted.lengths)
        assert found.version.tolist() == [version] * len(found)
        assert replies(found) != before, "the weights did not arrive"
        before = replies(found)


def test_a_sample_does_not_depend_on_its_batch_and_each_part_of_its_key_gives_another(pair: Pair) -> None:
    asked = prompts()
    together = pair.vllm.generate(asked, SAMPLED)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(1))
    assert replies(pair.vllm.generate(asked.select(order), SAMPLED)) == [replies(together)[n] for n in order.tolist()]
    assert replies(pair.vllm.generate(asked.select([3]).trimmed(), SAMPLED)) == replies(together)[3:4]
    row = Prompts(torch.tensor([[5, 6, 7]] * 3), torch.tensor([3] * 3), torch.tensor([[1, 0], [2, 0], [1, 1]]))
    first, *others = replies(pair.vllm.generate(row, SAMPLED))
    for sampling in (Sampling(1.0, 12, 4, 5), Sampling(1.0, 12, 3, 6)):
        others += replies(pair.vllm.generate(row.select([0]), sampling))
    assert all(other != first for other in others)


def test_prompts_of_more_tokens_than_a_pass_holds_are_read_in_several(pair: Pair) -> None:
    tokens = torch.randint(2, VOCABULARY, (20, 30), generator=torch.Generator().manual_seed(0))
    asked = Prompts(tokens, torch.full((20,), 30), torch.tensor([[n, 0] for n in range(20)]))
    together = replies(pair.vllm.generate(asked, SAMPLED))
    assert [replies(pair.vllm.generate(asked.select([n]), SAMPLED))[0] for n in range(20)] == together


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_policys_at_the_sampling_temperature(pair: Pair, temperature: float) -> None:
    pair.sync(20)
    found = pair.vllm.generate(prompts(), Sampling(temperature, 12, 0, 0))
    with torch.no_grad():
        logprobs, _ = pair.policy(found.tokens, found.mask, temperature)
    torch.testing.assert_close(found.behaviour, logprobs, atol=1e-3, rtol=0)
    assert not found.behaviour[~found.mask].any()


def test_replies_end_with_the_end_token_or_at_the_limit(pair: Pair) -> None:
    found = pair.vllm.generate(prompts(200), Sampling(1.5, 12, 0, 0))
    ended = [reply[-1] == END for reply in replies(found)]
    assert found.finished.tolist() == ended and 0 < sum(ended) < 200
    for reply, end in zip(replies(found), ended, strict=True):
        assert END not in reply[:-1] and (end or len(reply) == 12)


def test_what_does_not_fit_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        pair.vllm.generate(prompts(), Sampling(1.0, 60, 0, 0))
    with pytest.raises(RuntimeError, match=r"Unexpected keys \['nobody'\]"):
        pair.vllm.load_weights({"lm.nobody": torch.zeros(1)}, 1)
    names = list(pair.vllm.shapes)
    pair.vllm.load_weights(halves(pair)[0], None)
    with pytest.raises(RuntimeError, match="have not come yet"):
        pair.vllm.generate(prompts(), GREEDY)
    pair.vllm.load_weights(halves(pair)[1], 30)
    assert pair.vllm.generate(prompts(), GREEDY).version.unique().tolist() == [30]
    assert list(pair.vllm.shapes) == names


def halves(pair: Pair) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {f"lm.{name}": pair.policy.state_dict()[f"lm.{name}"].clone() for name in pair.vllm.shapes}
    names = list(weights)
    return {name: weights[name] for name in names[:3]}, {name: weights[name] for name in names[3:]}


def test_a_checkpoint_takes_the_place_of_the_weights(pair: Pair, tmp_path: Path) -> None:
    pair.sync(40)
    wanted = replies(pair.vllm.generate(prompts(), GREEDY))
    save_model(pair.policy, pair.policy.state_dict(), tmp_path)
    pair.change(99.0)
    pair.sync(41)
    assert replies(pair.vllm.generate(prompts(), GREEDY)) != wanted
    pair.vllm.reload(str(tmp_path))
    found = pair.vllm.generate(prompts(), GREEDY)
    assert replies(found) == wanted and found.version.unique().tolist() == [0]


def test_replies_that_were_begun_before_they_were_asked_for_are_those_of_one_call(pair: Pair) -> None:
    pair.sync(15)
    asked = prompts()
    together = pair.vllm.generate(asked, SAMPLED)
    first, *later = asked.split(8)
    pair.vllm.expect(asked, SAMPLED)
    found = [pair.vllm.generate(part, SAMPLED) for part in (first, *later)]
    assert [reply for part in found for reply in replies(part)] == replies(together)
    assert not pair.vllm.expected and not pair.vllm.done


def test_replies_that_nobody_came_for_go_with_their_weights(pair: Pair) -> None:
    asked = prompts()
    pair.vllm.expect(asked, GREEDY)
    pair.vllm.generate(asked.select([0]).trimmed(), GREEDY)
    pair.change(16)
    pair.sync(16)
    found = pair.vllm.generate(asked, GREEDY)
    assert replies(found) == replies(pair.plain.generate(asked, GREEDY))
    assert set(found.version.tolist()) == {16} and not pair.vllm.llm.has_unfinished_requests()
