"""What clients send, as OpenAI's API has it. Fields that are not known are accepted and ignored; known ones that cannot be served are
refused by name (`refuse_unsupported`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestration.serving.errors import unsupported


def _encodable(text: str) -> str:
    """Half a surrogate pair can be written in JSON, and is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Field(ge=1, le=128)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
Stop = Text | Annotated[list[Text], Field(max_length=16)] | None


class Form(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextPart(Form):
    type: Literal["text", "refusal"]
    text: Text = ""


class OtherPart(Form):
    type: Text


class CalledFunction(Form):
    name: Name
    arguments: Text = "{}"


class ToolCall(Form):
    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Form):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart | OtherPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Form):
    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


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
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    conversation: Name | ConversationRef | None = None


class CompletionForm(Generating):
    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Annotated[list[int], Field(min_length=1)] | Annotated[
        list[list[int]], Field(min_length=1)
    ]  # fmt: skip
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False


class ModerationForm(Form):
    input: Text | Annotated[list[Text | TextPart | OtherPart], Field(min_length=1, max_length=256)]
    model: Text | None = None


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
