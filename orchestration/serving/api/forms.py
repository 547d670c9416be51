"""What clients send, as OpenAI's API has it. Fields that are not known are accepted and ignored; known ones that cannot be served are
refused by name (`refuse_unsupported`).

Every list has a longest length, and every text too but for those that `serving.limits.characters` counts. With an error for each wrong
entry of its lists, one body took seconds to refuse: the first is enough (`listed`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from conf.serving import MOST_CHOICES, MOST_MESSAGES
from orchestration.serving.errors import unsupported

MOST_LIKELIEST = 20
"""Alternatives at each token of a reply."""
MOST_IDS = 2**20
"""Token ids of one prompt: the context decides, and the body's size."""


def _encodable(text: str) -> str:
    """Half a surrogate pair can be written in JSON, and is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


def listed(most: int, least: int = 0) -> Any:
    """A list's length, in a form: no entry is looked at after the first wrong one."""
    return Field(min_length=least, max_length=most, fail_fast=True)


Text = Annotated[str, AfterValidator(_encodable)]
Short = Annotated[Text, Field(max_length=256)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
Ids = Annotated[list[Annotated[int, Field(ge=-(2**31), lt=2**31)]], listed(MOST_IDS, least=1)]
Stop = Short | Annotated[list[Short], listed(16)] | None
"""Each is looked for at every piece of a reply, and as much text as it has is held back."""


class Form(BaseModel):
    model_config = ConfigDict(extra="allow")


class Part(Form):
    """A part of a message. One form for all types: of a union each would be tried."""

    type: Short
    text: Text = ""

    @property
    def is_text(self) -> bool:
        return self.type in ("text", "refusal")


class CalledFunction(Form):
    name: Name
    arguments: Annotated[Text, Field(max_length=2**16)] = "{}"


class ToolCall(Form):
    id: Short = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Form):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], listed(1024)] | None = None
    tool_calls: Annotated[list[ToolCall], listed(128)] | None = None


Messages = Annotated[list[ChatMessage], listed(MOST_MESSAGES, least=1)]


class Function(Form):
    name: Annotated[Text, Field(max_length=128, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Tool(Form):
    type: Literal["function"]
    function: Function


class StreamOptions(Form):
    include_usage: bool | None = None


class Generating(Form):
    """What both kinds of completions have in common."""

    model: Name
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ConversationRef(Form):
    id: Name
    before: Name | None = None
    """A message of it, for edited and repeated turns: the request takes its place, and later messages go once there is a reply."""


class ChatForm(Generating):
    messages: Messages
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    tools: Annotated[list[Tool], listed(128)] | None = None
    tool_choice: Short | dict[str, Any] | None = None
    conversation: Name | ConversationRef | None = None


class CompletionForm(Generating):
    prompt: Text | Annotated[list[Text], listed(MOST_CHOICES, least=1)] | Ids | Annotated[list[Ids], listed(MOST_CHOICES, least=1)]
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool | None = False


class ModerationForm(Form):
    input: Text | Annotated[list[Text | Part], listed(256, least=1)]
    model: Short | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "functions": (),
    "function_call": ("none", "auto"),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields of OpenAI's API that are not served, and the values that ask for nothing."""


def refuse_unsupported(form: Generating) -> None:
    """Raises:
    ApiError: the request asks for something that exists in OpenAI's API and not here.
    """
    for name, neutral in NEUTRAL.items():
        value = (form.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise unsupported(name, "not supported by this server; leave it out")
    if form.stream_options is not None and not form.stream:
        raise unsupported("stream_options", "only allowed when 'stream' is true")
