"""The body of a Messages request -> what chat.py takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harmonium.chat import ChatRequest
from harmonium.errors import ApiError
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.grammar_request import read_answer_format
from harmonium.harmony.grammar_text import FREE_TEXT, TextFormat
from harmonium.harmony.messages import Conversation, ReasoningEffort, ResponseFormat
from harmonium.model.batch import SamplingParams
from harmonium.server.config import Limits, ServerConfig
from harmonium.server.efforts import effort_of
from harmonium.server.errors import wrong_value
from harmonium.server.messages_history import read_history
from harmonium.server.messages_schema import MessagesRequest, PromptFields, check_request
from harmonium.server.messages_tools import ToolRules, read_tool_rules
from harmonium.server.responses_seal import Seal
from harmonium.server.state import ServerState
from harmonium.server.tool_input import check_schema_size

LOW_BUDGET, HIGH_BUDGET = 4096, 16384
"""A budget below the first is low effort, one from the second on high, others medium: about what the models
write at these efforts.
"""


@dataclass(frozen=True, slots=True)
class ThinkingPlan:
    """How the model shall reason, and what of it the client sees.

    max_tokens: of the reasoning; None: no limit; 0: none at all. is_shown: as thinking blocks. is_omitted:
    these are empty but for their signature, which holds what was thought.
    """

    effort: ReasoningEffort
    max_tokens: int | None = None
    is_shown: bool = True
    is_omitted: bool = False


@dataclass(frozen=True, slots=True)
class PreparedMessage:
    """A request that was read."""

    chat_request: ChatRequest
    thinking: ThinkingPlan


def prepare_message(
    state: ServerState, body: MessagesRequest, seal: Seal, request_id: str, cache_salt: str = ""
) -> PreparedMessage:
    """Read a request. cache_salt: of its owner. Raises ApiError, RequestError, HarmonyError."""
    plan = read_thinking(body, state.config.effort)
    conversation, rules = _read_prompt(state, body, seal, plan)
    if body.messages[-1].get("role") == "assistant":
        raise ApiError(
            "messages ends with one of the assistant, which cannot be continued: a turn of the model always "
            "begins with its header",
            param=f"messages[{len(body.messages) - 1}].role",
            code="unsupported_parameter",
        )
    request = ChatRequest(
        conversation,
        _sampling(body),
        cache_salt=cache_salt,
        request_id=request_id,
        stop=tuple(body.stop_sequences or ()),
        grammar=rules,
        adapter=state.adapter_of(body.model),
    )
    return PreparedMessage(request, plan)


def read_conversation(state: ServerState, body: PromptFields, seal: Seal) -> Conversation:
    """Everything that the prompt of this request is made of. Raises as `prepare_message` does."""
    return _read_prompt(state, body, seal, read_thinking(body, state.config.effort))[0]


def _read_prompt(
    state: ServerState, body: PromptFields, seal: Seal, plan: ThinkingPlan
) -> tuple[Conversation, TurnRules | None]:
    limits = state.config.limits
    check_request(body, limits)
    history = read_history(body.system, body.messages, seal)
    tools = read_tool_rules(body, limits)
    answer, form = _answer_format(body, limits)
    conversation = Conversation(
        history.messages,
        instructions=history.instructions,
        tools=tools.tools,
        reasoning_effort=plan.effort,
        current_date=state.today,
        response_format=form,
    )
    rules = _turn_rules(state.config, tools, answer, plan)
    if rules is None and tools.choice == "none":
        conversation = replace(conversation, tools=())  # what is not offered is not called
    return conversation, rules


def read_thinking(body: PromptFields, default: ReasoningEffort) -> ThinkingPlan:
    """Read `thinking` and `output_config.effort`, which has the last word on the effort. Raises ApiError.

    Where `thinking` is absent, the model reasons at the server's effort; this is shown only where tools are
    offered, for then it must come back in the next request, and such clients look blocks up by their type.
    """
    asked = None if body.output_config is None else body.output_config.effort
    effort = effort_of(asked, "output_config.effort", default)
    given = body.thinking
    if given is None:
        return ThinkingPlan(effort, is_shown=bool(body.tools))
    if given.display not in (None, "summarized", "omitted"):
        raise wrong_value("thinking.display", given.display, "summarized or omitted")
    is_omitted = given.display == "omitted"
    match given.type:
        case "adaptive":
            return ThinkingPlan(effort, is_omitted=is_omitted)
        case "disabled":
            return ThinkingPlan("low" if asked is None else effort, max_tokens=0, is_shown=False)
        case "enabled":
            budget = _budget(body, given.budget_tokens)
            of_budget = "low" if budget < LOW_BUDGET else "medium" if budget < HIGH_BUDGET else "high"
            return ThinkingPlan(
                effort_of(of_budget, "thinking", default) if asked is None else effort,
                max_tokens=budget,
                is_omitted=is_omitted,
            )
    raise wrong_value("thinking.type", given.type, "enabled, adaptive or disabled")


def _budget(body: PromptFields, budget: int | None) -> int:
    where = "thinking.budget_tokens"
    if budget is None or budget < 1:
        raise wrong_value(where, budget, "at least 1")
    if isinstance(body, MessagesRequest) and budget >= body.max_tokens:
        raise wrong_value(where, budget, f"fewer than max_tokens, which is {body.max_tokens:,}")
    return budget


def _answer_format(body: PromptFields, limits: Limits) -> tuple[TextFormat, ResponseFormat | None]:
    """`output_config.format`, or `output_format` as it was called before. The schema holds or is refused."""
    config = body.output_config
    where, form = "output_format", body.output_format
    if config is not None and config.format is not None:
        where, form = "output_config.format", config.format
    if form is None:
        return FREE_TEXT, None
    if form.get("type") != "json_schema":
        raise wrong_value(f"{where}.type", form.get("type"), "json_schema")
    schema: Any = form.get("schema")
    if not isinstance(schema, Mapping):
        raise wrong_value(f"{where}.schema", schema, "a JSON schema (an object)")
    check_schema_size(f"{where}.schema", schema, limits)
    return read_answer_format({"type": "json_schema", "schema": schema, "strict": True}, where)


def _turn_rules(
    config: ServerConfig, tools: ToolRules, answer: TextFormat, plan: ThinkingPlan
) -> TurnRules | None:
    """None where the grammar is off. Raises ApiError for what only the grammar could hold then."""
    if config.uses_grammar:
        return TurnRules(
            tool_choice=tools.choice,
            allowed_tools=tools.allowed,
            max_calls=tools.max_calls,
            answer=answer,
            strict_tools=tools.strict,
            max_reasoning_tokens=plan.max_tokens,
        )
    needs = {
        "tool_choice": tools.choice == "required",
        "output_config.format": answer.kind != "text",
        "tools": bool(tools.strict),
    }
    for name, is_needed in needs.items():
        if is_needed:
            raise ApiError(
                f"{name} cannot be held to: the grammar is off", param=name, code="unsupported_parameter"
            )
    return None


def _sampling(body: MessagesRequest) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "max_tokens": body.max_tokens,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
