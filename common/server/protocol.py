"""What a request may hold: every field, its type and its range. A field that is not here is refused by name.

Fields that other servers take and that have no meaning here (`user`, `store`, ...) are accepted and change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quasar.server.errors import ApiError

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 64
MAX_TOOLS = 128

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Strict(BaseModel):
    """No unknown fields, no strings for numbers, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(BaseModel):
    """Parts of messages: clients send back whatever they were given, so unknown fields are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


# --- messages -------------------------------------------------------------------------------------------------------


class TextPart(Lenient):
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Lenient):
    name: Name
    arguments: str = "{}"


class ToolCall(Lenient):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ApiError(f"a {self.role} message needs content", param="messages")
        return self

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


# --- tools and formats ----------------------------------------------------------------------------------------------


class Function(Lenient):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Lenient):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


# --- what all generating requests share -----------------------------------------------------------------------------


class Sampling(Strict):
    """How tokens are chosen. None: the server's own default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"keys are token ids, not {key[:40]!r}")
        return value

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Generating(Sampling):
    """Fields of both /v1/chat/completions and /v1/completions."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Ours, after llama.cpp's and vLLM's names: figures of speculation in the response, and in every chunk.
    timings_per_token: bool | None = None
    return_metrics: bool | None = None
    return_pieces: bool | None = None
    return_token_ids: bool | None = None
    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _usage_goes_with_streams(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options goes with stream: true", param="stream_options")
        return self


class ChatRequest(Generating):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs goes with logprobs: true", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ApiError("tool_choice goes with tools", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ApiError(
                    f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools",
                    param="tool_choice",
                )
        return self


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=256)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=256)]
)


class CompletionRequest(Generating):
    """/v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError("best_of other than n is not supported", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens 0 goes with echo: true", param="max_tokens")
        return self


# --- /v1/responses --------------------------------------------------------------------------------------------------


class InputMessage(Lenient):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class InputFunctionCall(Lenient):
    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str


class InputFunctionOutput(Lenient):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


class InputReasoning(Lenient):
    type: Literal["reasoning"]


class ResponseTool(Lenient):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(Strict):
    type: Literal["function"]
    name: Name


class ResponseJsonSchema(Lenient):
    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseText(Lenient):
    format: Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")] | None = None


class ResponseReasoning(Lenient):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Strict):
    """/v1/responses. Responses are not stored: there is no previous_response_id."""

    model: str | None = None
    input: (
        str
        | Annotated[
            list[InputMessage | InputFunctionCall | InputFunctionOutput | InputReasoning],
            Field(min_length=1, max_length=4096),
        ]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    stream: bool | None = None
    # Ours.
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_metrics: bool | None = None
    # Accepted without effect.
    background: Literal[False] | None = None
    include: list[str] | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream_options: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None


# --- /v1/messages ---------------------------------------------------------------------------------------------------


class TextBlock(Lenient):
    type: Literal["text"]
    text: str


class ThinkingBlock(Lenient):
    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Lenient):
    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]


class ToolResultBlock(Lenient):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(Lenient):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Lenient):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]


class AnthropicToolChoice(Lenient):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class CountTokensRequest(Strict):
    """/v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest):
    """/v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _tool_is_there(self) -> MessagesRequest:
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise ApiError("tool_choice goes with tools", param="tool_choice")
        if choice is not None and choice.type == "tool" and choice.name not in [t.name for t in self.tools or ()]:
            raise ApiError(f"tool_choice names {choice.name!r}, which is not among the tools", param="tool_choice")
        return self


# --- tokens ---------------------------------------------------------------------------------------------------------


class TokenizeRequest(Strict):
    """/tokenize: of a text, or of messages in the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("give prompt or messages, one of them", param="prompt")
        return self


class DetokenizeRequest(Strict):
    """/detokenize."""

    model: str | None = None
    tokens: list[TokenId]
