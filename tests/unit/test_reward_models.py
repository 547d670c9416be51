"""Reward models with other tokenizers and templates score text as when it is encoded for them directly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from actors.batch import Rollouts
from actors.models import ScalarModel, load_scalar_model, new_causal_lm, save_model
from actors.reward import Reward
from actors.reward_network import FeatureModel, load_reward_model, save_network
from actors.rewards.model import kind_of
from actors.rewards.source import RewardError, Texts
from actors.sampling import assemble
from actors.worker import RankSpec, process_group_of_one
from conf.rewards import ModelReward
from orchestration.data.chat import Chat, learn_tokenizer, load_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.scoring import ReplyEncoder
from orchestration.stages.rewarding import same_tokens
from tests.fakes import floats, saved_lm, smoke, with_section

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SAID = [
    ("where is my cup?", "it is in the drawer."),
    ("paint a vase", "héllo wörld ☕ <|end|> and more"),
    ("hello, my name is ann. what is it?", "ann"),
    ("who?", ""),
]
FINISHED = [True, False, True, True]


def contexts() -> list[Dialogue]:
    return [Dialogue(str(n), (Message("system", "be kind"), Message("user", question))) for n, (question, _) in enumerate(SAID)]


def learned(vocabulary: int, *texts: str) -> Chat:
    dialogues = [Dialogue("x", (Message("user", text), Message("assistant", text))) for text in texts]
    return Chat(learn_tokenizer(dialogues, vocabulary))


@pytest.fixture(scope="module")
def policy() -> Chat:
    return learned(300, "where is my cup? it is in the drawer. hello")


@pytest.fixture(scope="module")
def other() -> Chat:
    return learned(340, "paint the vase with a thin brush and two coats of the best colour, ann")


def rollouts(policy: Chat) -> Rollouts:
    """The replies as the policy would have sampled them."""
    prompts = policy.prompts(contexts(), [(n, 0) for n in range(len(SAID))])
    ids = [policy.text(reply) + ([policy.end] if done else []) for (_, reply), done in zip(SAID, FINISHED, strict=True)]
    counts = torch.tensor([len(row) for row in ids])
    padded = torch.zeros(len(ids), int(counts.max()), dtype=torch.long)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return assemble(prompts, padded, torch.zeros(padded.shape), counts, torch.tensor(FINISHED), 0)


def scalar_folder(folder: Path, chat: Chat) -> str:
    folder.mkdir()
    lm = new_causal_lm(smoke("scale.context=512").scale, len(chat.tokenizer), 3, 0.0, chat.end, chat.pad)
    model = ScalarModel(lm.base_model, 3)
    save_model(model, model.state_dict(), folder)
    chat.save(folder)
    return str(folder)


def feature_folder(folder: Path, chat: Chat) -> str:
    """A model that reads the reply alone, and what the reply says."""
    folder.mkdir()
    lm = new_causal_lm(smoke("scale.context=512").scale, len(chat.tokenizer), 3, 0.0, chat.end, chat.pad)
    model = FeatureModel(lm, ("reply", "likelihood", "tokens"))
    with torch.no_grad():
        model.head.weight.copy_(floats(1, *model.head.weight.shape))
    save_network(model, model.state_dict(), folder)
    chat.save(folder)
    return str(folder)


def classifier_folder(folder: Path, chat: Chat, pad: int | None, labels: int = 1) -> str:
    torch.manual_seed(5)
    shape = LlamaConfig(vocab_size=len(chat.tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=512, pad_token_id=pad, num_labels=labels)  # fmt: skip
    LlamaForSequenceClassification(shape).save_pretrained(folder)
    chat.save(folder)
    return str(folder)


def scored(path: str, policy: Chat, encoder: ReplyEncoder | None, size: int = 3) -> torch.Tensor:
    process_group_of_one()
    role = Reward(with_section(smoke(), "ppo", rewards=(ModelReward("model", path=path),)), "", RankSpec("reward", 0, 1, 1))
    role.load()
    role.prepare(Texts([c.as_list() for c in contexts()], policy, {"model": encoder} if encoder else {}))
    return torch.cat(role.score(rollouts(policy).split(size)))


def test_a_scalar_model_of_another_vocabulary_scores_the_same_text(policy: Chat, other: Chat, tmp_path: Path) -> None:
    assert not same_tokens(policy.tokenizer, other.tokenizer)
    path = scalar_folder(tmp_path / "rm", other)
    found = scored(path, policy, ReplyEncoder("model", Chat(load_tokenizer(path, "test")), 512, False))
    model = load_scalar_model(path, 0).eval()
    for n, (context, (_, reply), done) in enumerate(zip(contexts(), SAID, FINISHED, strict=True)):
        ids = other.encode(context.answered(reply))[0]
        ids = ids if done else ids[:-1]  # what did not end has no end token, as when the model was trained
        with torch.no_grad():
            direct = model.scores(torch.tensor([ids]), torch.tensor([len(ids)]))
        torch.testing.assert_close(found[n : n + 1], direct, atol=1e-5, rtol=1e-5)
    assert len({round(score, 4) for score in found.tolist()}) == len(SAID)


@pytest.mark.parametrize("own", [True, False], ids=["the policy's tokenizer", "another"])
def test_a_feature_model_reads_the_reply_where_it_stands(own: bool, policy: Chat, other: Chat, tmp_path: Path) -> None:
    theirs = policy if own else other
    path = feature_folder(tmp_path / "rm", theirs)
    found = scored(path, policy, None if own else ReplyEncoder("model", Chat(load_tokenizer(path, "test")), 512, False))
    model = load_reward_model(path, 0).eval()
    assert isinstance(model, FeatureModel)
    for n, (context, (_, reply), done) in enumerate(zip(contexts(), SAID, FINISHED, strict=True)):
        prompt, said = theirs.prompt(context), theirs.text(reply) + ([theirs.end] if done else [])
        mask = torch.tensor([[False] * len(prompt) + [True] * len(said)])
        with torch.no_grad():
            direct = model(torch.tensor([prompt + said]), torch.tensor([mask.shape[1]]), mask)
        torch.testing.assert_close(found[n : n + 1], direct, atol=1e-4, rtol=1e-4)
    assert len({round(score, 4) for score in found.tolist()}) == len(SAID)


def test_with_the_same_tokenizer_text_and_tokens_score_the_same(policy: Chat, tmp_path: Path) -> None:
    path = scalar_folder(tmp_path / "rm", policy)
    by_text = scored(path, policy, ReplyEncoder("model", policy, 512, False))
    torch.testing.assert_close(scored(path, policy, None), by_text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [True, False], ids=["pad token", "no pad token"])
def test_a_classifier_with_a_template_of_its_own_scores_what_it_would_alone(padded: bool, policy: Chat, tmp_path: Path) -> None:
    other = learned(340, "paint the vase with a thin brush")
    other.tokenizer.add_special_tokens({"bos_token": "<s>"})
    other.tokenizer.chat_template = CHATML
    path = classifier_folder(tmp_path / "rm", other, other.pad if padded else None)
    found = scored(path, policy, ReplyEncoder("model", Chat(load_tokenizer(path, "test")), 512, True))
    tokenizer, model = load_tokenizer(path, "test"), AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    for n, (context, (_, reply)) in enumerate(zip(contexts(), SAID, strict=True)):
        plain = reply.replace("<|end|>", "< |end|>")  # nobody can fake the end of a turn
        messages = [*context.as_list(), {"role": "assistant", "content": plain}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            direct = model(input_ids=torch.tensor([ids])).logits[:, 0]
        torch.testing.assert_close(found[n : n + 1], direct, atol=1e-5, rtol=1e-5)


def test_a_conversation_longer_than_the_models_context_loses_its_oldest_turns_and_nothing_of_the_reply(other: Chat) -> None:
    context = [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "who?"}]
    encoder = ReplyEncoder("model", other, 40, False)
    ((ids, of_reply),) = encoder.encode([context], ["ann"], [True])
    wanted, mask = other.encode(Dialogue("", (Message("user", "who?"), Message("assistant", "ann"))))
    assert ids == wanted and of_reply == sum(mask)
    with pytest.raises(RewardError, match="model: a reply alone is .* and it takes 40; lower ppo.max_new_tokens"):
        encoder.encode([context], ["ann " * 60], [True])


def test_what_gives_no_reward_is_refused(policy: Chat, tmp_path: Path) -> None:
    lm, three = saved_lm(tmp_path / "lm"), classifier_folder(tmp_path / "three", policy, 0, labels=3)
    with pytest.raises(RewardError, match="here=.*LlamaForCausalLM gives no reward"):
        kind_of(lm, "here")
    with pytest.raises(RewardError, match="a classifier with 3 labels gives no reward"):
        kind_of(three, "here")
    with pytest.raises(RewardError, match="no model can be loaded"):
        kind_of(str(tmp_path), "here")
