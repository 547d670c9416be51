"""The chat page: one browser tab, and the conversation it shows.

composer ─▶ send ─▶ Writing (backend.ask, backend.write) ─▶ TurnView.grow ... TurnView.show ─▶ kept in the conversation
"""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from nicegui import background_tasks, ui
from starlette.requests import Request

from orchestration.serving.errors import ApiError, failed
from orchestration.serving.keys import Owner
from orchestration.serving.page import notes
from orchestration.serving.page.backend import LISTED, Backend
from orchestration.serving.page.controls import note
from orchestration.serving.page.layout import Actions, Layout
from orchestration.serving.page.listing import Listing
from orchestration.serving.page.sessions import Sessions
from orchestration.serving.page.theme import Theme, remember
from orchestration.serving.page.thoughts import Thoughts, ask_for_words
from orchestration.serving.page.turn_view import TurnActions, TurnView
from orchestration.serving.page.turns import Answer, Turn, title_of
from orchestration.serving.page.writing import Writing, settled
from orchestration.serving.store.records import Conversation

logger = logging.getLogger("chatray.serving")
SHOWN = 10
"""Turns that are put on the page at a time: to draw one takes 6 ms, in which nobody else is served."""
CONSENT = "chatray_consent"
"""Cookie with the box's state, for conversations to come."""


class ChatPage:
    """The page's state, and what its controls do."""

    def __init__(self, owner: Owner, sessions: Sessions, request: Request) -> None:
        session = request.session["id"]
        self.backend = Backend(sessions.service, lambda: sessions.owner(session))
        self.client = ui.context.client
        self.conversation: Conversation | None = None
        self.turns: list[Turn] = []
        self.views: list[TurnView] = []
        self.first = 0
        """The first of the turns that is on the page."""
        self.listed: str | None = None
        """The conversation behind which the list begins; None: it begins with the newest."""
        self.writing: Writing | None = None
        self.count = 1
        """Answers to ask for: 2, to have one chosen."""
        self.agreed = request.cookies.get(CONSENT) == "1"
        self.thoughts = Thoughts(self.backend, lambda: self.agreed)

        def sign_out() -> None:
            sessions.sign_out(session)
            ui.navigate.to("/")

        leave = sign_out if sessions.needs_key else None
        actions = Actions(self.send, self.stop, self.new, self.consent, self.compare_mode, self.earlier, leave)
        self.layout = Layout(Theme(request), self.backend.models, actions, owner.name, self.agreed)
        self.listing = Listing(self.layout.list, self.open, self.delete)
        self.turn_actions = TurnActions(self.edit, self.regenerate, self.thumb, self.comment, self.choose, self.judge_again)
        self.client.on_delete(self.stop)

    async def build(self, name: str | None) -> None:
        """Show a conversation, or an empty page."""
        if name is not None:
            await self._settled(name)
            await self._guarded(self._load(name))
        await self.refresh_list()
        self.draw()

    async def _guarded(self, work: Awaitable[Any]) -> bool:
        """Whether it went well; what went wrong is shown above the composer."""
        try:
            await work
            return True
        except ApiError as error:
            self.tell(notes.told(error))
        except Exception:
            logger.exception("the chat page failed")
            self.tell(notes.told(failed()))
        return False

    def tell(self, text: str | None) -> None:
        """Show a notice above the composer; None takes it away."""
        if self.client.is_deleted:
            return
        self.layout.notices.clear()
        if text:
            with self.layout.notices:
                note(text, "error")

    def announce(self, text: str) -> None:
        """Tell screen readers."""
        if not self.client.is_deleted:
            self.layout.status.set_text(text)

    # conversations

    async def _settled(self, name: str) -> None:
        """Wait for what is still being written in a conversation: a page that was loaded again stops what the one before it asked for."""
        await self._guarded(settled(self.backend.owner.id, name))

    async def _load(self, name: str) -> None:
        self.conversation, self.turns = await self.backend.conversation(name)
        self.first = max(0, len(self.turns) - SHOWN)
        await self.backend.rendered(self.turns[self.first :])
        self._show_consent(self.conversation.consent)

    async def open(self, name: str) -> None:
        """Show another conversation."""
        self.stop()
        await self._settled(name)
        if await self._guarded(self._load(name)):
            self.tell(None)
            self._address("push", f"/c/{name}")
        await self.refresh_list()
        self.draw()
        self._close_drawer()

    async def new(self) -> None:
        """An empty page; the conversation is made with its first message."""
        self.stop()
        self.conversation, self.turns, self.first = None, [], 0
        self.tell(None)
        self._address("push", "/")
        await self.refresh_list()
        self.draw()
        self._close_drawer()
        self.layout.focus()

    async def delete(self, name: str) -> None:
        if self.conversation and self.conversation.id == name:
            self.stop()
            await self._settled(name)
        self.listed = None if self.listed == name else self.listed
        if await self._guarded(self.backend.delete_conversation(name)) and self.conversation and self.conversation.id == name:
            await self.new()
        await self.refresh_list()

    async def refresh_list(self) -> None:
        async def work() -> None:
            found = await self.backend.conversations(self.listed)
            steps = [("Newest", lambda: self.list_from(None))] if self.listed else []
            if len(found) == LISTED:
                steps.append(("Earlier", lambda: self.list_from(found[-1].id)))
            self.listing.show(found, self.conversation.id if self.conversation else None, steps)

        if not self.client.is_deleted:
            await self._guarded(work())

    async def list_from(self, after: str | None) -> None:
        """Show another part of the list."""
        self.listed = after
        await self.refresh_list()

    def _close_drawer(self) -> None:
        self.client.run_javascript("chatray.closeDrawer()")

    def _address(self, verb: Literal["push", "replace"], path: str) -> None:
        """What stands in the browser's address bar, and what a reload finds."""
        self.client.run_javascript(f'history.{verb}State({{}}, "", {json.dumps(path)})')

    async def consent(self, given: bool) -> None:
        """Whether feedback may be learned from: in this conversation and, until changed, in those to come."""
        if given == self.agreed:
            return
        self.agreed = given
        remember(CONSENT, "1" if given else "0")
        if self.conversation:
            await self._guarded(self.backend.consent(self.conversation.id, given))

    def _show_consent(self, given: bool) -> None:
        self.agreed = given
        self.layout.consent.value = given

    def compare_mode(self, on: bool) -> None:
        self.count = 2 if on else 1

    # drawing

    def draw(self) -> None:
        """Show the conversation as it is now; turns that are on the page already stay as they are."""
        if self.client.is_deleted:
            return
        same, shown = 0, self.turns[self.first :]
        while same < min(len(self.views), len(shown)) and self.views[same].turn is shown[same]:
            same += 1
        for view in self.views[same:]:
            view.place.delete()
        with self.layout.turns:
            self.views[same:] = [TurnView(turn, self.turn_actions) for turn in shown[same:]]
        for number, view in enumerate(self.views):
            last = number == len(self.views) - 1
            if number >= same or view.last != last:
                view.show(last=last)
        self.layout.empty.set_visibility(not self.turns)
        self.layout.earlier.set_visibility(self.first > 0)
        title = self.conversation.title if self.conversation else ""
        with self.client:
            ui.page_title(f"{title} – chatray" if title else "chatray")

    async def earlier(self) -> None:
        """Show some of the turns before those that are on the page."""
        turns, until = self.turns, self.first
        first = max(0, until - SHOWN)
        await self.backend.rendered(turns[first:until])
        if self.turns is not turns or self.first != until or self.client.is_deleted:
            return
        with self.layout.turns:
            views = [TurnView(turn, self.turn_actions) for turn in turns[first:until]]
        for place, view in enumerate(views):
            view.show(last=False)
            view.place.move(target_index=place)
        self.views[:0], self.first = views, first
        self.layout.earlier.set_visibility(first > 0)

    async def _redraw(self, turn: Turn) -> None:
        await self._guarded(self.backend.rendered([turn]))
        for view in self.views:
            if view.turn is turn:
                view.show(last=view.last)

    # writing

    async def send(self, text: str) -> None:
        """Say something new."""
        if self.writing or not text.strip():
            return
        self.layout.text.set_value("")
        await self._write(Turn(text.strip()), self.turns, None)

    async def edit(self, turn: Turn, text: str) -> None:
        """Say something else, and cut off what came after."""
        if self.writing or not text.strip():
            return
        await self._write(Turn(text.strip()), self.turns[: self.turns.index(turn)], turn)

    async def regenerate(self, turn: Turn) -> None:
        """Have a message answered again."""
        if self.writing:
            return
        if turn.id is None:  # it was not kept: said again
            await self._write(Turn(turn.text), self.turns[: self.turns.index(turn)], None)
        else:
            await self._write(Turn(turn.text), self.turns[: self.turns.index(turn)], turn, again=True)

    def stop(self) -> None:
        if self.writing:
            self.writing.stop()

    async def _write(self, turn: Turn, before: list[Turn], instead: Turn | None, again: bool = False) -> None:
        """Have a turn answered, in place of another one and all after it if that is given. If it fails, all is as it was."""
        was, self.turns = self.turns, [*before, turn]
        self.writing = Writing(self.backend, turn, self.layout.model.value, self.count, instead.id if instead else None)
        self.tell(None)
        self.layout.busy(True)
        self.announce("An answer is being written.")
        earlier = instead.answer if again and instead and instead.answer and instead.answer.finish in ("stop", "length") else None
        answer = self._answer(self.writing, was, earlier)
        # not in the context of this tab's connection: Serve would cancel it with that, though the page may connect again and go on
        contextvars.Context().run(background_tasks.create, answer, name="answer", context=self.layout.turns)

    async def _answer(self, writing: Writing, was: list[Turn], earlier: Answer | None) -> None:
        turn = writing.turn
        fresh = self.conversation is None
        try:
            turn.answers = [Answer() for _ in range(writing.count)]
            self.draw()
            view = self.views[-1]
            view.show(last=True, writing=True)
            self.client.run_javascript("chatray.follow()")
            if fresh:
                await self._begin(turn)
            assert self.conversation is not None
            await writing.run(self.conversation.id, view)
            await self.backend.rendered([turn])
            if earlier and turn.answer and len(turn.answers) == 1 and turn.answer.text != earlier.text:
                turn.answer.earlier = earlier
            view.error = writing.error
        except ApiError as error:
            self.tell(notes.told(error))
        except Exception:
            logger.exception("the chat page failed")
            self.tell(notes.told(failed()))
        finally:
            self.writing = None
        if not turn.answers:
            await self._undo(turn, was, fresh)
        await self._ended(turn)

    async def _begin(self, turn: Turn) -> None:
        self.conversation, self.listed = await self.backend.new_conversation(title_of(turn.text), self.agreed), None
        self._address("replace", f"/c/{self.conversation.id}")
        await self.refresh_list()

    async def _undo(self, turn: Turn, was: list[Turn], fresh: bool) -> None:
        """Nothing came of it: all is as it was, and the text back in the composer."""
        if fresh and self.conversation:
            await self._guarded(self.backend.delete_conversation(self.conversation.id))
            self.conversation = None
            self._address("replace", "/")
            await self.refresh_list()
        self.turns = was
        if not self.client.is_deleted and not self.layout.text.value and turn.text not in [one.text for one in was]:
            self.layout.text.set_value(turn.text)

    async def _ended(self, turn: Turn) -> None:
        if self.client.is_deleted:
            return
        self.layout.busy(False)
        self.draw()
        await self._redraw(turn)
        self.layout.focus()
        answer = turn.answer
        self.announce(notes.of_end(answer) or notes.of_output(answer) or "The answer is complete." if answer else "Nothing was written.")

    # feedback

    async def thumb(self, turn: Turn, answer: Answer, value: str) -> None:
        if self.conversation and await self._guarded(self.thoughts.thumb(self.conversation.id, self.turns, turn, answer, value)):
            await self._redraw(turn)
            self.announce("Thank you." if answer.thumb else "Your thumb was taken back.")

    async def comment(self, turn: Turn, answer: Answer) -> None:
        words = await ask_for_words()
        if words and self.conversation and await self._guarded(
            self.thoughts.say(self.conversation.id, self.turns, turn, answer, *words)
        ):  # fmt: skip
            with self.client:
                ui.notify("Thank you. Your comment was kept.", type="positive")

    async def choose(self, turn: Turn, better: Answer | None) -> None:
        """Of two answers that stand side by side, keep the better one in the conversation."""
        if self.conversation is None or len(turn.answers) != 2:
            return
        first, second = turn.answers
        name = self.conversation.id

        async def work() -> None:
            await self.thoughts.prefer(name, self.turns, turn, (first, second), better)
            if better is second:
                await self.backend.prefer(name, turn, second)

        if await self._guarded(work()):
            turn.answers = [second if better is second else first]
            await self._redraw(turn)
            self.announce("Thank you. Your choice was kept.")

    async def judge_again(self, turn: Turn, value: str) -> None:
        """Whether the new answer is better than the one before."""
        answer = turn.answer
        if self.conversation is None or answer is None or answer.earlier is None:
            return
        better: Callable[[], Answer | None] = lambda: {"better": answer, "worse": answer.earlier}.get(value)  # noqa: E731
        if await self._guarded(self.thoughts.prefer(self.conversation.id, self.turns, turn, (answer.earlier, answer), better())):
            answer.earlier = None
            await self._redraw(turn)
            self.announce("Thank you.")
