"""Messages -> token ids, as the gpt-oss models were trained to read them.

Text of users, developers, tools, schemas and names goes through `Vocabulary.encode`, so it cannot become a
special token. docs/harmony.md lists where this differs from the Harmony library, and why.

Source: openai/harmony:docs/format.md and src/encoding.rs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from harmonium.errors import HarmonyError
from harmonium.harmony.messages import CHANNELS, CONSTRAIN_NAME, Conversation, Message, Tool, ToolNamespace
from harmonium.harmony.typescript import comment_lines, typescript
from harmonium.harmony.vocabulary import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    VOCABULARY_SIZE,
    vocabulary,
)


def render_prompt(conversation: Conversation) -> list[int]:
    """The tokens to continue from: the whole conversation, then <|start|>assistant.

    Reasoning before the last final answer is left out; reasoning after it (in a tool loop) stays.
    Raises HarmonyError for what the format cannot express.
    """
    ids = render_messages(opening_messages(conversation) + without_old_reasoning(conversation.messages))
    return [*ids, START, *vocabulary().encode("assistant")]


def render_training(conversation: Conversation) -> list[int]:
    """The conversation as a training example: a closing final answer ends in <|return|>, its reasoning stays.

    Earlier turns lose their reasoning, as they have in the prompts that the model will see.
    """
    messages = conversation.messages
    ends_in_final = bool(messages) and _is_final(messages[-1])
    history = (
        without_old_reasoning(messages[:-1]) + messages[-1:]
        if ends_in_final
        else without_old_reasoning(messages)
    )
    ids = render_messages(opening_messages(conversation) + history)
    if ends_in_final:
        ids[-1] = RETURN
    return ids


def render_messages(messages: Iterable[Message]) -> list[int]:
    """The messages one after the other, nothing added and nothing left out."""
    ids: list[int] = []
    for message in messages:
        ids += render_message(message)
    return ids


def without_old_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without those on the analysis channel that stand before the last final answer.

    Source of the rule: openai/harmony:docs/format.md, "Handling reasoning output in subsequent sampling".
    """
    last_final = max((index for index, message in enumerate(messages) if _is_final(message)), default=-1)
    return tuple(
        message
        for index, message in enumerate(messages)
        if index > last_final or message.channel != "analysis"
    )


def _is_final(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final"


def render_message(message: Message) -> list[int]:
    """One message, from <|start|> to its closing token; a message with `token_ids` is those.

    Raises HarmonyError when token_ids hold an id outside the vocabulary.
    """
    if message.token_ids is not None:
        bad = next((token_id for token_id in message.token_ids if not 0 <= token_id < VOCABULARY_SIZE), None)
        if bad is not None:
            raise HarmonyError(f"token_ids of a message hold {bad}; ids go from 0 to {VOCABULARY_SIZE - 1:,}")
        return list(message.token_ids)
    encode = vocabulary().encode
    is_call = message.role == "assistant" and message.recipient is not None and message.recipient != "all"
    header = _call_header(message) if is_call else _header(message)
    return [START, *header, MESSAGE, *encode(message.content), CALL if is_call else END]


def _header(message: Message) -> list[int]:
    encode = vocabulary().encode
    if message.role == "tool":
        assert message.name, "Message.__post_init__ checks it"
        ids = encode(message.name)
    else:
        ids = encode(message.role)
        if message.name:
            ids += encode(f":{message.name}")
    if message.recipient is not None and message.recipient != "all":
        ids += encode(f" to={message.recipient}")
    if message.channel:
        ids += [CHANNEL, *encode(message.channel)]
    return ids + _content_type(message.content_type)


def _call_header(message: Message) -> list[int]:
    """The order in which the model writes a call: the recipient follows the channel.

    The Harmony library puts it after the role; the model then meets a form that it does not write itself and
    starts to mix both: a glued `<|channel|>` in a tool's name is what comes of it.
    """
    encode = vocabulary().encode
    ids = encode("assistant")
    if message.name:
        ids += encode(f":{message.name}")
    channel = message.channel or "commentary"
    return [*ids, CHANNEL, *encode(f"{channel} to={message.recipient}"), *_content_type(message.content_type)]


def _content_type(content_type: str | None) -> list[int]:
    encode = vocabulary().encode
    if not content_type:
        return []
    if content_type.startswith(CONSTRAIN_NAME):
        return [*encode(" "), CONSTRAIN, *encode(content_type.removeprefix(CONSTRAIN_NAME))]
    return encode(f" {content_type}")


def opening_messages(conversation: Conversation) -> tuple[Message, ...]:
    """The system message and, where there is anything to say in it, the developer message."""
    system = Message("system", system_text(conversation))
    developer = developer_text(conversation)
    return (system, Message("developer", developer)) if developer else (system,)


def system_text(conversation: Conversation) -> str:
    """Who the model is, what it knows, how hard to think, its built-in tools, its channels."""
    facts = []
    if conversation.model_identity is not None:
        facts.append(conversation.model_identity)
    if conversation.knowledge_cutoff is not None:
        facts.append(f"Knowledge cutoff: {conversation.knowledge_cutoff}")
    if conversation.current_date is not None:
        facts.append(f"Current date: {conversation.current_date}")
    sections = ["\n".join(facts)] if facts else []
    sections.append(f"Reasoning: {conversation.reasoning_effort}")
    if conversation.builtin_tools:
        sections.append(_tools_section(conversation.builtin_tools))
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if conversation.tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    sections.append(channels)
    return "\n\n".join(sections)


def developer_text(conversation: Conversation) -> str:
    """Instructions, function tools and the response format; "" when there is none of them."""
    sections = []
    if conversation.instructions:
        sections.append(instructions_text(conversation.instructions))
    if conversation.tools:
        sections.append(_tools_section([ToolNamespace("functions", tools=conversation.tools)]))
    if conversation.response_format is not None:
        form = conversation.response_format
        comment = "".join(f"// {line}\n" for line in comment_lines(form.description))
        schema = json.dumps(form.schema, ensure_ascii=False, separators=(",", ":"))
        sections.append(f"# Response Formats\n\n## {form.name}\n\n{comment}{schema}")
    return "\n\n".join(sections)


def instructions_text(instructions: str) -> str:
    """The text of a developer message that holds nothing but these instructions."""
    return f"# Instructions\n\n{instructions}"


def _tools_section(namespaces: Sequence[ToolNamespace]) -> str:
    ordered = sorted(namespaces, key=lambda namespace: namespace.name.encode())
    return "\n\n".join(["# Tools", *(_namespace_text(namespace) for namespace in ordered)])


def _namespace_text(namespace: ToolNamespace) -> str:
    lines = [f"## {namespace.name}\n"]
    if not namespace.tools:
        return "\n".join(lines + comment_lines(namespace.description))
    lines += [f"// {line}" for line in comment_lines(namespace.description)]
    lines.append(f"namespace {namespace.name} {{\n")
    for tool in namespace.tools:
        lines += _tool_lines(tool)
    lines.append(f"}} // namespace {namespace.name}")
    return "\n".join(lines)


def _tool_lines(tool: Tool) -> list[str]:
    lines = [f"// {line}" for line in comment_lines(tool.description)]
    try:
        parameters = typescript(tool.parameters) if tool.parameters else None
    except HarmonyError as error:
        raise HarmonyError(f"parameters of tool {tool.name!r}: {error}") from None
    lines.append(f"type {tool.name} = ({f'_: {parameters}' if parameters else ''}) => any;\n")
    return lines
