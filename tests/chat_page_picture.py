"""Draw docs/chat_page.png: what a served model writes in the chat page, as it writes it. Start `chatray serve … runtime=local`, then

python -m tests.chat_page_picture http://127.0.0.1:8000 "another conversation" "the one in the picture | its second message"
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.chat_page import chromium

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "chat_page.png"
WAIT_MS = 180_000


def main(url: str, *conversations: str) -> None:
    """The last conversation is in the picture; the others stand in the list."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1200, "height": 720}).new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(url)
        for number, messages in enumerate(conversations):
            if number:
                page.get_by_role("button", name="New chat").click()
            for turn, message in enumerate(messages.split(" | "), 1):
                page.get_by_label("Message", exact=True).fill(message)
                page.get_by_label("Message", exact=True).press("Enter")
                expect(page.locator("section.turn")).to_have_count(turn, timeout=WAIT_MS)
                expect(page.locator("article.answer .markdown").last).not_to_be_empty(timeout=WAIT_MS)
                expect(page.locator(".answer.writing")).to_have_count(0, timeout=WAIT_MS)
        page.wait_for_load_state("networkidle")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
