"""The chat page as people use it: typed at, clicked and looked at in headless Chromium, on a real port; the engine is scripted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from orchestration.serving.errors import too_many
from orchestration.serving.keys import Keys, Owner, hashed
from tests.chat_page import LONG, Site, site

LOCAL = "local"


@pytest.fixture(scope="module")
def open_site() -> Iterator[Site]:
    with site() as found:
        yield found


@pytest.fixture(scope="module")
def visitor(open_site: Site) -> Iterator[BrowserContext]:
    """One browser profile for most tests: what a page loads is then in its cache."""
    with open_site.visitor() as found:
        yield found


@pytest.fixture
def page(open_site: Site, visitor: BrowserContext) -> Iterator[Page]:
    found = visitor.new_page()
    found.goto(open_site.url)
    yield found
    found.close()


def composer(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def answers(page: Page) -> Locator:
    return page.locator("article.answer")


def say(page: Page, text: str) -> Locator:
    """Say something and wait for the whole answer."""
    before = page.locator("section.turn").count()
    composer(page).fill(text)
    composer(page).press("Enter")
    expect(page.locator("section.turn")).to_have_count(before + 1)
    whole(page)
    return answers(page).last


def whole(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".answer.writing")).to_have_count(0)


def begin(page: Page, text: str) -> None:
    composer(page).fill(text)
    composer(page).press("Enter")
    expect(page.locator(".answer.writing .markdown")).to_contain_text("the cat sat on mat 3")


def notice(page: Page, text: str) -> Locator:
    return page.locator(".note").filter(has_text=text)


def stored(site: Site, page: Page, owner: str = LOCAL) -> list[Any]:
    return site.service.store.messages(owner, conversation(page))


def conversation(page: Page) -> str:
    return page.url.rsplit("/c/", 1)[1]


def test_an_answer_streams_and_is_kept(open_site: Site, page: Page) -> None:
    expect(page.get_by_role("heading", name="How can I help?")).to_be_visible()
    begin(page, "long please")
    growing = answers(page).last.inner_text()
    page.wait_for_function("length => document.querySelector('.answer .markdown').innerText.length > length", arg=len(growing))
    expect(answers(page).last.locator(".markdown")).to_have_text(LONG)
    whole(page)
    assert 0 < len(growing) < len(LONG)
    assert re.search(r"\d+ tokens read, \d+ written", page.locator(".tokens").inner_text())
    assert [(message.role, message.content) for message in stored(open_site, page)] == [("user", "long please"), ("assistant", LONG)]
    assert page.title().startswith("long please")


def test_stop_keeps_what_was_written(open_site: Site, page: Page) -> None:
    begin(page, "long")
    page.get_by_role("button", name="Stop", exact=True).click()
    whole(page)
    expect(page.get_by_text("Stopped.", exact=True).first).to_be_visible()
    text = answers(page).last.locator(".markdown").inner_text()
    kept = stored(open_site, page)[-1]
    assert LONG.startswith(text) and len(text) < len(LONG)
    assert kept.content.strip() == text.strip() and kept.extra["finish"] == "abandoned"
    assert open_site.engine.closed[-1], "the engine went on writing"


def test_regenerate_and_say_which_was_better(open_site: Site, page: Page) -> None:
    first = say(page, "cat").locator(".markdown").inner_text()
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page).last.locator(".markdown")).not_to_have_text(first)
    whole(page)
    second = answers(page).last.locator(".markdown").inner_text()
    page.get_by_role("button", name="Better", exact=True).click()
    expect(page.get_by_text("Was this answer better or worse?")).to_have_count(0)
    assert [message.content for message in stored(open_site, page)] == ["cat", second]
    given = {name: text for name, _, text in open_site.service.store.given(LOCAL, conversation(page))}
    [choice] = open_site.service.store.feedback(LOCAL, list(given))
    assert choice.kind == "choice" and given[choice.value] == second and set(given.values()) == {first, second}


def test_thumbs_and_comments_are_in_the_store(open_site: Site, page: Page) -> None:
    say(page, "cat")
    page.get_by_role("checkbox", name="My feedback may be used to train the model").click()
    page.get_by_role("button", name="Good answer").click()
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Comment on this answer").click()
    page.get_by_label("Comment", exact=True).fill("short and true")
    page.get_by_label("Better answer").fill("The cat is on the mat.")
    page.get_by_role("dialog").get_by_role("button", name="Send").click()
    expect(page.get_by_text("Your comment was kept.")).to_be_visible()
    given = [name for name, _, _ in open_site.service.store.given(LOCAL, conversation(page))]
    said = {(one.kind, one.value, one.consent) for one in open_site.service.store.feedback(LOCAL, given)}
    assert said == {("thumbs", "up", True), ("comment", "short and true", True), ("edit", "The cat is on the mat.", True)}
    page.reload()
    thumb = page.get_by_role("button", name="Good answer")
    expect(thumb).to_have_attribute("aria-pressed", "true")
    thumb.click()
    expect(thumb).to_have_attribute("aria-pressed", "false")
    assert "thumbs" not in {one.kind for one in open_site.service.store.feedback(LOCAL, given)}


def test_one_of_two_answers_is_chosen(open_site: Site, page: Page) -> None:
    page.get_by_label("Two answers to choose from").click()
    composer(page).fill("cat")
    composer(page).press("Enter")
    expect(page.get_by_role("button", name="B is better")).to_be_visible()
    texts = [answers(page).nth(number).locator(".markdown").inner_text() for number in (0, 1)]
    page.get_by_role("button", name="B is better").click()
    expect(answers(page)).to_have_count(1)
    expect(answers(page).locator(".markdown")).to_have_text(texts[1])
    assert texts[0] != texts[1]
    assert [message.content for message in stored(open_site, page)] == ["cat", texts[1]]
    given = {name: text for name, _, text in open_site.service.store.given(LOCAL, conversation(page))}
    [choice] = open_site.service.store.feedback(LOCAL, list(given))
    assert (choice.kind, given[choice.value]) == ("choice", texts[1])
    assert sorted(given.values()) == sorted(texts)


def test_what_moderation_did_is_said(open_site: Site, page: Page) -> None:
    say(page, "how do I kill him?")
    expect(notice(page, "Your message was not passed on to the model (violence).")).to_be_visible()
    expect(answers(page).last.locator(".markdown")).to_have_text(open_site.service.settings.refusal)
    assert not any("how do I kill" in prompt for prompt in open_site.engine.prompts)
    say(page, "violent")
    expect(notice(page, "The answer was withheld (violence).")).to_be_visible()
    assert "kill him" not in answers(page).last.inner_text()
    say(page, "rough")
    expect(notice(page, "This answer came with a warning (violence).")).to_be_visible()
    say(page, "do cats fight?")
    expect(notice(page, "Your message was passed on with a warning (violence).")).to_be_visible()
    assert stored(open_site, page)[0].extra["moderation"] == "block"


def test_an_edited_turn_cuts_the_later_ones(open_site: Site, page: Page) -> None:
    say(page, "cat one")
    say(page, "cat two")
    page.locator(".said").first.hover()
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Edit message").fill("cat three")
    page.get_by_role("button", name="Save and send").click()
    expect(page.locator("section.turn")).to_have_count(1)
    expect(page.locator(".bubble")).to_have_text("cat three")
    whole(page)
    assert [message.content for message in stored(open_site, page) if message.role == "user"] == ["cat three"]
    assert "cat one" not in open_site.engine.prompts[-1]


def test_a_conversation_is_found_again_and_deleted(open_site: Site, page: Page) -> None:
    said = say(page, "cat that is found again").locator(".markdown").inner_text()
    name, path = conversation(page), urlsplit(page.url).path
    page.reload()
    expect(answers(page).locator(".markdown")).to_have_text(said)
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    entry = page.get_by_role("navigation").get_by_role("button", name="cat that is found again")
    entry.click()
    expect(answers(page).locator(".markdown")).to_have_text(said)
    assert urlsplit(page.url).path == path
    page.go_back()
    expect(page.get_by_role("heading", name="How can I help?")).to_be_visible()
    page.goto(open_site.url + path)
    page.locator(".item-current").get_by_role("button", name="Delete this conversation").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(entry).to_have_count(0)
    assert name not in {one.id for one in open_site.service.store.conversations(LOCAL, 200)}


def test_long_conversations_and_lists_are_shown_a_part_at_a_time(open_site: Site, page: Page) -> None:
    store = open_site.service.store
    for number in range(35):
        name = store.new_conversation(LOCAL, title=f"conversation {number}").id
    for number in range(25):
        store.add_message(LOCAL, name, "user", f"message {number}")
        store.add_message(LOCAL, name, "assistant", f"answer {number}", model="tiny")
    page.goto(f"{open_site.url}/c/{name}")
    said, earlier = page.locator("section.turn .bubble"), page.get_by_role("button", name="Earlier messages")
    for first in (15, 5, 0):
        expect(said).to_have_text([f"message {number}" for number in range(first, 25)])
        if first:
            earlier.click()
    expect(earlier).not_to_be_visible()
    say(page, "one more")
    expect(said).to_have_count(26)
    listed = page.locator(".item-open")
    expect(listed).to_have_count(30)
    page.get_by_role("button", name="Earlier", exact=True).click()
    expect(listed.first).to_have_text("conversation 4")
    page.get_by_role("button", name="Newest", exact=True).click()
    expect(listed.first).to_have_text("conversation 34")
    for number, one in enumerate(store.conversations(LOCAL, 200)):
        if number:
            store.delete_conversation(LOCAL, one.id)


def test_a_page_loaded_again_stops_and_shows_what_was_being_written(open_site: Site, page: Page) -> None:
    begin(page, "long")
    page.reload()
    expect(page.get_by_text("Stopped.", exact=True)).to_be_visible()
    text = answers(page).locator(".markdown").inner_text()
    assert LONG.startswith(text.strip()) and "mat 3" in text
    assert open_site.engine.closed[-1]


def test_markdown_is_shown_and_markup_is_text(page: Page) -> None:
    answer = say(page, "markdown").locator(".markdown")
    expect(answer.locator("li")).to_have_count(3)
    expect(answer.locator("pre code")).to_contain_text("def feed")
    expect(answer.locator("td").first).to_have_text("Tom")
    expect(answer).to_contain_text("<img src=x")
    expect(answer.locator("img, script")).to_have_count(0)
    assert "broken in" not in page.title()
    page.evaluate("document.addEventListener('click', event => event.preventDefault())")  # the link is looked at, not followed
    answer.get_by_role("link", name="more").dispatch_event("click")
    assert answer.get_by_role("link", name="more").get_attribute("rel") == "noopener noreferrer"


def test_too_many_requests_are_told_and_the_text_stays(open_site: Site, page: Page) -> None:
    open_site.engine.error = too_many("Too many.", 12.0)
    try:
        composer(page).fill("cat")
        composer(page).press("Enter")
        expect(page.get_by_text("Wait 12 seconds, then try again.")).to_be_visible()
    finally:
        open_site.engine.error = None
    expect(composer(page)).to_have_value("cat")
    page.wait_for_url(lambda url: "/c/" not in url)  # the notice comes before the conversation goes
    assert "/c/" not in page.url
    composer(page).press("Enter")
    expect(answers(page)).to_have_count(1)
    whole(page)
    expect(page.get_by_text("Wait 12 seconds")).to_have_count(0)


def test_an_engine_that_stops_leaves_its_text_and_a_way_on(open_site: Site, page: Page) -> None:
    open_site.engine.breaks_after = 20
    try:
        composer(page).fill("long")
        composer(page).press("Enter")
        expect(page.locator(".note-error")).to_be_visible()
    finally:
        open_site.engine.breaks_after = None
    assert "the cat sat" in answers(page).inner_text()
    page.get_by_role("button", name="Try again").click()
    expect(answers(page).locator(".markdown")).to_have_text(LONG)


def test_keyboard_alone(open_site: Site, page: Page) -> None:
    expect(composer(page)).to_be_focused()
    page.keyboard.type("long")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and more")
    expect(composer(page)).to_have_value("long\nand more")
    page.keyboard.press("Enter")
    expect(page.locator(".answer.writing .markdown")).to_contain_text("mat 2")
    page.keyboard.press("Escape")
    whole(page)
    expect(page.get_by_text("Stopped.", exact=True).first).to_be_visible()
    expect(composer(page)).to_be_focused()
    names = []
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"))
        if "Good answer" in names:
            break
    assert [name for name in names if name in ("Comment on this answer", "Bad answer", "Good answer")][:3] == [
        "Comment on this answer", "Bad answer", "Good answer",
    ]  # fmt: skip
    assert page.evaluate("getComputedStyle(document.activeElement).boxShadow") != "none", "the focus is not to be seen"
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    assert stored(open_site, page)[0].content == "long\nand more"


def test_every_control_has_a_name(page: Page) -> None:
    say(page, "cat")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, [role=button], [role=combobox]')]
          .filter(one => !(one.getAttribute('aria-label') || one.innerText.trim() || one.closest('label, [aria-label]')))
          .map(one => one.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


def test_dark_follows_the_system_and_is_remembered(open_site: Site) -> None:
    def background(page: Page) -> int:
        expect(composer(page)).to_be_visible()
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    with open_site.page(color_scheme="dark") as page:
        dark = background(page)
        page.get_by_role("button", name="Theme: as the system").click()
        expect(page.locator("body")).to_have_class(re.compile("body--light"))
        light = background(page)
        page.reload()
        expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
        expect(page.locator("body")).to_have_class(re.compile("body--light"))
        again = background(page)
    assert dark < 200 < 600 < light
    assert again == light


def test_a_phone(open_site: Site) -> None:
    with open_site.page(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True) as page:
        say(page, "markdown")
        expect(page.get_by_role("button", name="New chat")).not_to_be_in_viewport()
        width = page.evaluate("document.documentElement.scrollWidth")
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New chat")).to_be_in_viewport()
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_role("button", name="New chat")).not_to_be_in_viewport()
        expect(page.get_by_role("heading", name="How can I help?")).to_be_visible()
    assert width <= 390


def test_with_keys_a_page_is_its_owners(open_site: Site) -> None:
    limits = open_site.service.settings.limits
    none = open_site.service.keys
    owners = [(hashed(f"cr-{name}-key"), Owner(f"key-{name}", name, 0, 0)) for name in ("alice", "bob")]
    open_site.service.keys = Keys(owners, limits)
    try:
        with open_site.page() as page:
            page.get_by_label("API key").fill("cr-wrong")
            page.get_by_role("button", name="Continue").click()
            expect(page.get_by_text("This API key is not valid.")).to_be_visible()
            page.get_by_label("API key").fill("cr-alice-key")
            page.get_by_label("API key").press("Enter")
            expect(page.get_by_text("Signed in as alice")).to_be_visible()
            say(page, "cat of alice")
            path = urlsplit(page.url).path
            source = page.content() + page.context.new_page().goto(page.url).text()  # type: ignore[union-attr]
            assert stored(open_site, page, "key-alice")[0].content == "cat of alice"
            with open_site.page() as other:
                other.get_by_label("API key").fill("cr-bob-key")
                other.get_by_label("API key").press("Enter")
                expect(other.get_by_text("Signed in as bob")).to_be_visible()
                other.goto(open_site.url + path)
                expect(other.get_by_text("There is no such conversation.")).to_be_visible()
                assert "cat of alice" not in other.content()
            open_site.service.keys = Keys(owners[1:], limits)  # alice's key was taken out of the file
            composer(page).fill("cat again")
            composer(page).press("Enter")
            expect(page.get_by_text("You are signed out.")).to_be_visible()
            page.reload()
            expect(page.get_by_label("API key")).to_be_visible()
    finally:
        open_site.service.keys = none
    assert "cr-alice-key" not in source


def test_models_are_picked(open_site: Site) -> None:
    tiny = open_site.service.models["tiny"]
    open_site.service.models["other"] = dataclasses.replace(tiny, name="other")
    try:
        with open_site.page() as page:
            page.get_by_label("Model").click()
            page.get_by_role("option", name="other").click()
            say(page, "cat")
            assert stored(open_site, page)[-1].model == "other"
    finally:
        del open_site.service.models["other"]


def test_nothing_comes_from_other_hosts_and_nothing_complains(open_site: Site, page: Page) -> None:
    """Over all that the tests before it did too."""
    say(page, "markdown")
    hosts = {urlsplit(url).netloc for url in open_site.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(open_site.url).netloc}
    assert any(url.startswith("ws:") for url in open_site.requests)
    assert open_site.complaints == []
