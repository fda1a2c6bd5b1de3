"""The body of a chat completion -> what chat.py takes. Raises ApiError, RequestError, HarmonyError."""

from __future__ import annotations

from dataclasses import replace

from harmonium.chat import ChatRequest
from harmonium.errors import ApiError
from harmonium.harmony.chat_history import messages_from_chat
from harmonium.harmony.grammar_request import read_answer_format
from harmonium.harmony.messages import Conversation, ResponseFormat, builtin_tool
from harmonium.server.chat_schema import ChatCompletionRequest, check_supported
from harmonium.server.config import Limits
from harmonium.server.efforts import effort_of
from harmonium.server.sampling_fields import check_counts, check_most, sampling_params
from harmonium.server.state import ServerState
from harmonium.server.template_fields import read_template_fields
from harmonium.server.tool_input import check_schema_size, read_tools
from harmonium.server.turn_rules import turn_rules


def chat_requests(
    state: ServerState, body: ChatCompletionRequest, completion_id: str, cache_salt: str = ""
) -> list[ChatRequest]:
    """One request for each of the n choices. cache_salt: of the owner and the request."""
    limits = state.config.limits
    check_supported(body)
    check_counts(body, limits)
    _check_chat_counts(body, limits)
    conversation = conversation_of(state, body)
    rules = turn_rules(body, state.config)
    if rules is None and body.tool_choice == "none":
        conversation = replace(conversation, tools=(), builtin_tools=())  # what is not offered is not called
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = _logprobs(body)
    return [
        ChatRequest(
            conversation,
            sampling_params(body, choice, max_tokens, logprobs),
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            cache_salt=cache_salt,
            request_id=f"{completion_id}-{choice}",
            stop=body.stop_texts(),
            grammar=rules,
            adapter=state.adapter_of(body.model),
        )
        for choice in range(body.n or 1)
    ]


def conversation_of(state: ServerState, body: ChatCompletionRequest) -> Conversation:
    """Everything that the prompt is made of."""
    template = read_template_fields(body.chat_template_kwargs)
    history = messages_from_chat(body.messages, template.builtin_tools)
    asked = body.reasoning_effort
    if asked is None and body.reasoning is not None:
        asked = body.reasoning.effort
    return Conversation(
        history.messages,
        instructions=history.instructions,
        tools=read_tools(body.tools, state.config.limits),
        builtin_tools=tuple(builtin_tool(name) for name in template.builtin_tools),
        reasoning_effort=template.effort or effort_of(asked, "reasoning_effort", state.config.effort),
        current_date=template.current_date or state.today,
        model_identity=template.model_identity,
        knowledge_cutoff=template.knowledge_cutoff,
        response_format=_response_format(body, state.config.limits),
    )


def _check_chat_counts(body: ChatCompletionRequest, limits: Limits) -> None:
    check_most("messages", len(body.messages), limits.messages, least=1, unit="messages")
    check_most("tools", len(body.tools or ()), limits.tools)
    metadata = body.metadata or {}
    check_most("metadata", len(metadata), limits.metadata)
    for text in (*metadata, *metadata.values()):
        check_most("metadata", len(text), limits.text_chars, unit="characters")


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise ApiError("top_logprobs is given without logprobs: true", param="top_logprobs")
        return None
    return body.top_logprobs or 0


def _response_format(body: ChatCompletionRequest, limits: Limits) -> ResponseFormat | None:
    """The schema as the prompt states it; None where the answer is free text or another format."""
    _, form = read_answer_format(body.response_format)
    if form is not None:
        check_most("response_format.name", len(form.name), 64, unit="characters")
        check_schema_size("response_format.schema", form.schema, limits)
    return form
