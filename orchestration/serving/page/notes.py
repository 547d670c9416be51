"""What people are told when something did not go through, in short: what it was, and what to do."""

from __future__ import annotations

from orchestration.serving.errors import ApiError
from orchestration.serving.page.turns import Answer, Turn

ENDED = "The server had an error. Try again; if it stays, tell whoever runs this server."


def told(error: ApiError) -> str:
    """What to do about an error of the service."""
    wait = "" if error.retry_after is None else f"{max(1, round(error.retry_after))} second{'s' if round(error.retry_after) > 1 else ''}"
    match error.status, error.code:
        case 401, _:
            return "You are signed out. Reload the page and enter your API key."
        case 429, "insufficient_quota":
            return f"This API key has used up its tokens. Wait {wait}, then try again."
        case 503, "engine_lost":
            return "What writes the answers stopped. Try again in a moment."
        case 503, "moderation_unavailable":
            return f"The server's moderation does not answer, so nothing is passed on. Wait {wait}, then try again."
        case ((429 | 503), _) if wait:
            return f"The server has too many requests at the moment. Wait {wait}, then try again."
        case 504, _:
            return "The answer took too long. Try again, or ask for something shorter."
        case 400, "context_length_exceeded":
            return "This message is longer than the model can read. Shorten it and send it again."
        case ((400 | 404 | 413), _):
            return error.message
    return ENDED


def of_input(turn: Turn) -> str | None:
    """What moderation did with the user's text."""
    if turn.action == "block":
        return f"Your message was not passed on to the model{_because(turn.categories)}. Edit it to go on."
    if turn.action == "warn":
        return f"Your message was passed on with a warning{_because(turn.categories)}."
    return None


def of_output(answer: Answer) -> str | None:
    """What moderation did with the answer."""
    if answer.blocked and answer.action == "block":
        return f"The answer was withheld{_because(answer.categories)}."
    if answer.blocked:
        return "The answer was ended by the server's filter."
    if answer.action == "warn":
        return f"This answer came with a warning{_because(answer.categories)}."
    return None


def of_end(answer: Answer) -> str | None:
    """How an answer ended that did not end by itself."""
    if answer.finish == "abandoned":
        return "Stopped."
    if answer.finish == "length":
        return "The answer reached its longest length."
    return None


def of_context(answer: Answer) -> str | None:
    if not answer.dropped:
        return None
    return (
        f"The oldest {answer.dropped} messages no longer fit and were not read."
        if answer.dropped > 1
        else "The oldest message no longer fits."
    )


def tokens(answer: Answer) -> str:
    """Token counts, shortly; "" if they are not known."""
    if not answer.written:
        return ""
    read = "" if answer.read is None else f"{answer.read} tokens read, "
    return f"{read}{answer.written} written"


def _because(categories: tuple[str, ...]) -> str:
    return f" ({', '.join(category.replace('_', ' ').replace('/', ': ') for category in categories)})" if categories else ""
