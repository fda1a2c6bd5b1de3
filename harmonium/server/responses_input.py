"""The body of a Responses request -> what chat.py takes, and what will be stored of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from harmonium.chat import ChatRequest
from harmonium.errors import ApiError
from harmonium.harmony.grammar_request import read_answer_format
from harmonium.harmony.messages import Conversation, Message, ResponseFormat
from harmonium.harmony.render import render_prompt
from harmonium.model.batch import SamplingParams
from harmonium.server.config import Limits
from harmonium.server.efforts import effort_of
from harmonium.server.responses_items import InputItems, compose, read_input
from harmonium.server.responses_object import ResponseFacts, format_object
from harmonium.server.responses_rules import response_rules
from harmonium.server.responses_schema import ResponsesRequest, TextFormat, check_request
from harmonium.server.responses_tools import ToolTable, read_tool_choice, read_tools
from harmonium.server.responses_truncation import room_for_answer, truncate
from harmonium.server.state import ServerState, cache_salt
from harmonium.server.store_records import RUNNING, Store, StoredConversation, StoredTurn
from harmonium.server.tool_input import check_schema_size


@dataclass(frozen=True, slots=True)
class PreparedResponse:
    """A request that was read. turn: what is stored of its input; the output is added when it is there."""

    facts: ResponseFacts
    chat_request: ChatRequest
    turn: StoredTurn
    owner: str = ""


def prepare_response(
    state: ServerState,
    store: Store,
    body: ResponsesRequest,
    *,
    response_id: str,
    created_at: int,
    owner: str = "",
) -> PreparedResponse:
    """Read a request. Blocks while the store is read and, with truncation, while prompts are measured.

    Raises ApiError (400; 404 for a model or a previous response that is not there), RequestError,
    HarmonyError.
    """
    limits = state.config.limits
    model = state.check_model(body.model)
    check_request(body, limits)
    tools = _tools(body, limits)
    earlier = _earlier(store, body.previous_response_id, owner)
    given = read_input(
        body.input, earlier.entries, store.seal, lambda item_id: store.find_item(item_id, owner)
    )
    date = earlier.date or state.today
    conversation, notes = _conversation(state, body, tools, earlier, given, date)
    choice = read_tool_choice(body.tool_choice, tools)
    rules, not_held = response_rules(body, tools, choice, state.config)
    if rules is None and choice.mode == "none":
        conversation = replace(conversation, tools=())  # what is not offered is not called
    facts = ResponseFacts(
        response_id=response_id,
        created_at=created_at,
        model=model,
        effort=conversation.reasoning_effort,
        request=body,
        tools=tools,
        warnings=(*_tool_warnings(tools), *given.warnings, *notes, *not_held),
    )
    return PreparedResponse(
        facts=facts,
        chat_request=ChatRequest(
            conversation,
            _sampling(body),
            cache_salt=cache_salt(owner, body.cache_salt),
            request_id=response_id,
            grammar=rules,
            adapter=state.adapter_of(body.model),
        ),
        turn=StoredTurn(body.previous_response_id, date, given.items, given.entries, earlier.entries),
        owner=owner,
    )


def _tools(body: ResponsesRequest, limits: Limits) -> ToolTable:
    table = read_tools(body.tools)
    for entry in table.entries:
        if entry.parameters:
            check_schema_size(f"parameters of tool {entry.declared!r}", entry.parameters, limits)
        if entry.format:
            check_schema_size(f"format of tool {entry.declared!r}", entry.format, limits)
    return table


def _tool_warnings(tools: ToolTable) -> list[str]:
    return [
        f"tool of type {kind} was left out: it does not run here" for kind in dict.fromkeys(tools.skipped)
    ]


def _earlier(store: Store, previous: str | None, owner: str) -> StoredConversation:
    """The conversation so far. Raises ApiError (404) when its last response is not stored."""
    if previous is None:
        return StoredConversation()
    found = store.conversation(previous, owner)
    body = store.body(previous, owner)
    if found is None or body is None:
        raise ApiError(
            f"previous_response_id is {previous[:100]!r}; no response of this id is stored",
            status=404,
            type="invalid_request_error",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if body["status"] in RUNNING:
        raise ApiError(
            f"previous_response_id is {previous[:100]!r}, which is {body['status']}; wait until it has ended",
            status=409,
            param="previous_response_id",
            code="previous_response_running",
        )
    return found


def _conversation(
    state: ServerState,
    body: ResponsesRequest,
    tools: ToolTable,
    earlier: StoredConversation,
    given: InputItems,
    date: str,
) -> tuple[Conversation, list[str]]:
    """Everything that the prompt is made of, and what was left out of it."""
    composed = compose(body.instructions, (*earlier.entries, *given.entries))
    asked = body.reasoning.effort if body.reasoning is not None else None
    fields: dict[str, Any] = {
        "instructions": composed.instructions,
        "tools": tools.harmony_tools,
        "reasoning_effort": effort_of(asked, "reasoning.effort", state.config.effort),
        "current_date": date,
        "response_format": _response_format(body.format, state.config.limits),
    }
    messages = composed.messages
    notes: list[str] = []
    if body.truncation == "auto":
        length = state.engine.info.context_length
        most = length - room_for_answer(length, body.max_output_tokens)
        cut = truncate(messages, lambda part: _num_tokens(fields, part), most)
        messages = tuple(messages[place] for place in cut.kept)
        if cut.dropped:
            ids = ", ".join(composed.item_ids[place] for place in cut.dropped)
            notes.append(
                f"truncation left out the oldest {len(cut.dropped):,} items of the conversation: {ids}"
            )
    return Conversation(messages, **fields), notes


def _num_tokens(fields: dict[str, Any], messages: Any) -> int:
    part: tuple[Message, ...] = tuple(messages)
    return len(render_prompt(Conversation(part, **fields)))


def _response_format(form: TextFormat, limits: Limits) -> ResponseFormat | None:
    """What the prompt says of the answer's format."""
    if form.schema_ is not None:
        check_schema_size("text.format.schema", form.schema_, limits)
    return read_answer_format(format_object(form), "text.format")[1]


def _sampling(body: ResponsesRequest) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "max_tokens": body.max_output_tokens,
        "logprobs": body.num_logprobs,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
