from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.comparisons import encode_judgements, encode_rankings
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.fitting import fitting_comparisons, fitting_dialogues, fitting_judgements, fitting_prompts, shortened
from orchestration.data.preferences import Comparison, Judgement
from orchestration.data.world.scenarios import demonstrations, prompts
from tests.fakes import quickly, smoke

FLAWS = smoke().data.flaws
chat = Chat(learn_tokenizer(demonstrations(60, 0, FLAWS), 400))
ROLES = ("user", "assistant", "tool")
contexts = st.lists(st.tuples(st.sampled_from(ROLES), st.integers(1, 12)), min_size=1, max_size=6).map(
    lambda turns: Dialogue("d", tuple(Message(role, "x y" * size) for role, size in turns))
)


def size(context: Dialogue) -> int:
    return len(chat.prompt(context))


def test_dialogues_that_fit_are_kept_whole_and_the_others_counted() -> None:
    some = demonstrations(30, 1, FLAWS)
    lengths = [len(chat.encode(d)[0]) for d in some]
    longest = sorted(lengths)[14]
    kept, _, dropped = fitting_dialogues(some, chat, longest)
    assert kept == [d for d, length in zip(some, lengths, strict=True) if length <= longest]
    assert dropped == 30 - len(kept)
    assert 0 < dropped < 30


@quickly
@given(context=contexts, room=st.integers(1, 120))
def test_a_context_loses_as_few_of_its_oldest_turns_as_must_go_and_starts_with_a_user_where_it_can(context: Dialogue, room: int) -> None:
    found = shortened(context, chat, room)
    suffixes = [Dialogue("d", context.messages[start:]) for start in range(len(context.messages))]
    fitting = [s for s in suffixes if size(s) <= room]
    if size(context) <= room:
        assert found == context
    elif not fitting:
        assert found is None
    else:
        from_user = [s for s in fitting if s.messages[0].role == "user"]
        assert found == (from_user or fitting)[0]


def test_prompts_that_lost_turns_are_counted_and_those_that_cannot_fit_are_left_out() -> None:
    some = prompts(40, 0, FLAWS, judging=False)
    room = sorted(map(size, some))[20]
    found, changed, left_out = fitting_prompts(some, chat, room)
    assert all(size(context) <= room for context in found)
    assert changed + left_out == sum(size(context) > room for context in some) > 0
    assert left_out == len(some) - len(found)
    endings = [context.messages[-1] for context in some]
    assert [context.messages[-1] for context in found] == [m for m in endings if size(Dialogue("", (m,))) <= room]
    assert fitting_prompts(some, chat, 2) == ([], 0, 40)


def judgement(context_words: int, reply_words: int) -> Judgement:
    messages = tuple(Message("user", "what is my name?") for _ in range(context_words))
    return Judgement(Dialogue(f"j{context_words}", messages), "noted " * reply_words, True)


def test_judgements_keep_their_reply_and_lose_turns_of_their_context_until_both_fit_as_they_are_encoded() -> None:
    given_rows = [judgement(n, 1 + n) for n in range(9)]
    longest = 60
    found, changed, _ = fitting_judgements(given_rows, chat, longest)
    assert [j.reply for j in found] == [j.reply for j in given_rows]
    assert int(encode_judgements(chat, found).lengths.max()) <= longest
    assert int(encode_judgements(chat, given_rows).lengths.max()) > longest
    assert changed == sum(len(a.context.messages) < len(b.context.messages) for a, b in zip(found, given_rows, strict=True))
    assert 0 < changed < 9
    for short, whole in zip(found, given_rows, strict=True):
        kept = len(short.context.messages)
        assert short.context.messages == whole.context.messages[len(whole.context.messages) - kept :]


def test_a_context_that_just_fits_is_not_touched() -> None:
    whole = judgement(3, 2)
    length = int(encode_judgements(chat, [whole]).lengths[0])
    assert fitting_judgements([whole], chat, length) == ([whole], 0, 0)
    assert fitting_judgements([whole], chat, length - 1).shortened == 1


def test_a_reply_that_is_too_long_alone_is_left_out_and_counted() -> None:
    assert fitting_judgements([judgement(3, 60), judgement(1, 1)], chat, 20).left_out == 1


def comparison(context_words: int, *reply_words: int) -> Comparison:
    answers = tuple("noted " * words for words in reply_words)
    return Comparison(judgement(context_words, 1).context, answers, (True,) * len(answers), tuple(range(len(answers))))


def test_comparisons_keep_all_their_answers_and_one_context_that_fits_the_longest() -> None:
    given_rows = [comparison(n, 1, 1 + n, 2) for n in range(9)] + [comparison(2, 1, 90)]
    found, changed, left_out = fitting_comparisons(given_rows, chat, 60)
    assert [c.answers for c in found] == [c.answers for c in given_rows[:-1]]
    assert int(encode_rankings(chat, found).lengths.max()) <= 60
    assert changed == sum(len(a.context.messages) < len(b.context.messages) for a, b in zip(found, given_rows, strict=False)) > 0
    assert left_out == 1


@quickly
@given(dialogue=contexts, longest=st.integers(1, 120))
def test_a_dialogue_that_keeps_its_end_loses_whole_turns_and_keeps_an_assistants(dialogue: Dialogue, longest: int) -> None:
    found, changed, left_out = fitting_dialogues([dialogue], chat, longest, "keep_end")
    whole = len(chat.encode(dialogue)[0])
    assert (changed, left_out) == ((0, 0) if whole <= longest else (1, 0) if found else (0, 1))
    for kept in found:
        assert kept.messages == dialogue.messages[len(dialogue.messages) - len(kept.messages) :]
        assert len(chat.encode(kept)[0]) <= longest
        assert whole <= longest or kept.assistant_turns()
    assert fitting_dialogues([dialogue], chat, longest).kept == ([dialogue] if whole <= longest else [])
