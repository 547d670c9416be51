"""A model's markdown as HTML that is safe to show: what looks like HTML in it is text, images are links, links open elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LONGEST = 30_000
"""Characters of a text that is read as markdown, more than replies have: what is made to be hard to read takes seconds there. A longer one
is shown as it is."""
LONGEST_CODE = 20_000
"""Characters of a block of code that is coloured; a longer one is shown plain."""


def _code(text: str, language: str, _: str) -> str:
    if not language or len(text) > LONGEST_CODE:
        return ""  # the library escapes it
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return ""
    return highlight(text, lexer, HtmlFormatter(nowrap=True, classprefix="k-"))


def _image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """An image is never fetched: whose server it is on would learn of the conversation."""
    text = self.renderInlineAsText(tokens[index].children or [], options, env)
    return f"<em>[image: {_escaped(text)}]</em>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _code, "breaks": True}).enable(["table", "strikethrough"])
    parser.add_render_rule("image", _image)
    return parser


PARSER = _parser()


def rendered(text: str) -> str:
    """HTML of markdown that may still be growing. Remembered, so that a thread can make it for the event loop (`Backend.rendered`)."""
    return _read(text) if len(text) <= LONGEST else f"<pre>{_escaped(text)}</pre>"


@functools.lru_cache(maxsize=256)
def _read(text: str) -> str:
    return PARSER.render(text)
