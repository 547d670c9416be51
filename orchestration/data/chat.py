"""One chat format for training, rollout and serving: dialogues to token ids with the assistant's tokens marked, and back.

chatray's own template puts a role token before each turn and one end-of-turn token behind it:

    <|user|>where is it?<|end|><|assistant|>in the drawer.<|end|>

It is saved with every checkpoint as the tokenizer's chat template. A pretrained model that brings its own template keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from actors.batch import Dialogues, Prompts, pad_rows
from orchestration.data.dialogues import ROLES, Dialogue
from orchestration.errors import RequestError

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def learn_tokenizer(dialogues: Iterable[Dialogue], vocabulary: int, texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the dialogues and from plain text, with chatray's template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END, *ROLE_TOKENS.values()], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    said = (message.content for dialogue in dialogues for message in dialogue.messages)
    bpe.train_from_iterator(chain(said, texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, additional_special_tokens=list(ROLE_TOKENS.values()),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load_tokenizer(path: str, setting: str) -> PreTrainedTokenizerBase:
    """A tokenizer by local path or hub name, fit for chat.

    Raises:
        RequestError: it cannot be loaded, has no end-of-turn token, or no chat template and not chatray's tokens; names `setting`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as cause:  # a spoilt file can fail anywhere in the loader
        raise RequestError(f"{setting}={path}: no tokenizer can be loaded from there ({_first_line(cause)})") from cause
    if tokenizer.eos_token is None:
        raise RequestError(f"{setting}={path}: this tokenizer has no end-of-turn (eos) token; choose one that has, or save it with one set")
    if tokenizer.chat_template is None:
        missing = [token for token in (END, *ROLE_TOKENS.values()) if token not in tokenizer.get_vocab()]
        if missing:
            raise RequestError(
                f"{setting}={path}: this tokenizer has no chat template and lacks the tokens of chatray's own: {' '.join(missing)}; "
                "choose a chat model's tokenizer, or add these tokens to it (and rows to the model's embedding)"
            )
        tokenizer.chat_template = TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # only ever seen where masks are false
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


class Chat:
    """A tokenizer as a chat format."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)
        self.own = tokenizer.chat_template == TEMPLATE
        if self.own:
            self.role_ids = {role: tokenizer.get_vocab()[token] for role, token in ROLE_TOKENS.items()}

    def encode(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them the assistant wrote (its end-of-turn tokens included)."""
        return self.encode_all([dialogue])[0]

    def encode_all(self, dialogues: Sequence[Dialogue]) -> list[tuple[list[int], list[bool]]]:
        """`encode` for many dialogues, their texts tokenized in one call."""
        if not self.own:
            return [self._encode_by_template(dialogue) for dialogue in dialogues]
        texts = iter(self.texts([message.content for dialogue in dialogues for message in dialogue.messages]))
        return [self._encode_turns(dialogue, texts) for dialogue in dialogues]

    def _encode_turns(self, dialogue: Dialogue, texts: Iterator[list[int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for message in dialogue.messages:
            text = next(texts)
            written = message.role == "assistant" and not message.scripted
            ids += [self.role_ids[message.role], *text, self.end]
            mask += [False] + [written] * (len(text) + 1)
        return ids, mask

    def text(self, content: str) -> list[int]:
        """Ids of plain text; what looks like a special token in it stays text, so that nobody can fake a turn."""
        return self.texts([content])[0]

    def texts(self, contents: Sequence[str]) -> list[list[int]]:
        """`text` for many."""
        if not contents:
            return []
        return self.tokenizer(list(contents), add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[return-value]

    def prompt(self, context: Dialogue) -> list[int]:
        """Ids of a context, up to where the assistant's reply begins."""
        return self.prompt_all([context])[0]

    def prompt_all(self, contexts: Sequence[Dialogue]) -> list[list[int]]:
        """`prompt` for many contexts."""
        if self.own:
            return [[*ids, self.role_ids["assistant"]] for ids, _ in self.encode_all(contexts)]
        empty = [{"role": "user", "content": ""}]
        return [self._rendered(context.as_list() or empty, True) for context in contexts]

    def _encode_by_template(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        messages = dialogue.as_list()
        ids = self._rendered(messages, False)
        mask = [False] * len(ids)
        for turn in dialogue.assistant_turns():
            before, through = self._rendered(messages[:turn], True), self._rendered(messages[: turn + 1], False)
            start, stop = len(before), len(through)
            if ids[:start] != before or ids[:stop] != through:
                raise RequestError(
                    f"model.tokenizer: its chat template renders message {turn + 1} of a conversation differently once others follow, so "
                    "the tokens the assistant wrote cannot be told apart; give the tokenizer a chat template that only ever appends"
                )
            if self.end not in ids[start:stop]:
                raise RequestError(
                    f"model.tokenizer: its chat template does not end the assistant's turns with {self.tokenizer.eos_token!r}, so a model "
                    "trained with it would never stop; set the tokenizer's eos_token to the template's end-of-turn token"
                )
            stop = start + ids[start:stop].index(self.end) + 1  # what follows the end token is layout, not the assistant's
            mask[start:stop] = [True] * (stop - start)
        return ids, mask

    def whole(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation as the template renders it, whoever wrote its turns."""
        return self._rendered(messages, False)

    def _plain(self, content: str) -> str:
        """Text in which nothing reads as a special token: a space after its first character breaks it."""
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[:1]} {token[1:]}")
        return content

    def _rendered(self, messages: list[dict[str, str]], generate: bool) -> list[int]:
        if not messages:  # templates refuse an empty conversation; what opens a reply is the same after any other
            other = [{"role": "user", "content": ""}]
            return self._rendered(other, generate)[len(self._rendered(other, False)) :]
        messages = [message | {"content": self._plain(message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a reply, without its end-of-turn token."""
        return str(self.tokenizer.decode([i for i in ids if i != self.end], skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token, by itself."""
        return str(self.tokenizer.decode([token]))

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def dialogues(self, dialogues: Sequence[Dialogue]) -> Dialogues:
        """A padded batch of whole dialogues with the assistant's mask."""
        encoded = self.encode_all(dialogues)
        tokens, lengths = pad_rows([ids for ids, _ in encoded])
        mask, _ = pad_rows([mask for _, mask in encoded], torch.bool)
        return Dialogues(tokens, lengths, mask)

    def prompts(self, contexts: Sequence[Dialogue], keys: Sequence[tuple[int, int]]) -> Prompts:
        """A padded batch of contexts; `keys` name each sample's (prompt, sample)."""
        tokens, lengths = pad_rows(self.prompt_all(contexts))
        return Prompts(tokens, lengths, torch.tensor(list(keys)).reshape(-1, 2))
