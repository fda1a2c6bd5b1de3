"""The state of an interactive chat and its slash commands: no terminal, so that all of it can be tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmonium.chat import ChatRequest
from harmonium.chat_events import ChatResult
from harmonium.errors import ConfigError, HarmonyError
from harmonium.harmony.chat_history import messages_from_chat
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.messages import Conversation, Message, ReasoningEffort, reasoning_effort
from harmonium.model.batch import SamplingParams
from harmonium.options import near
from harmonium.text_file import expand_home, read_text, write_text

HELP = """\
/effort low|medium|high   how long the model reasons
/system TEXT              instructions for the model; without TEXT: show them
/reasoning                show or fold reasoning (Ctrl-R too)
/clear                    forget the conversation
/save FILE                write the conversation as JSON; /save! FILE replaces a file
/quit                     end (Ctrl-D too)
Enter sends; Alt-Enter or a backslash at the end of a line starts another line; Ctrl-C stops an answer.
A blank before the slash sends a text that starts with one."""

COMMANDS = ("/effort", "/system", "/reasoning", "/clear", "/save", "/save!", "/help", "/quit")


@dataclass
class ChatSession:
    """A conversation that grows. Changed by `record`, `load` and `command` alone.

    messages: the user's and the model's, oldest first; a turn's tokens are replayed as the model wrote them.
    uses_grammar: turns are legal Harmony whatever the model would rather write. adapter: the LoRA adapter
    that answers; None: the model as it is.
    """

    sampling: SamplingParams
    current_date: str | None = None
    instructions: str | None = None
    effort: ReasoningEffort = "medium"
    messages: tuple[Message, ...] = ()
    shows_reasoning: bool = False
    uses_grammar: bool = True
    adapter: str | None = None
    has_quit: bool = False
    last_reasoning: str = field(default="", repr=False)

    def request(self, text: str) -> ChatRequest:
        """The request that asks for an answer to `text`, after everything said so far."""
        conversation = Conversation(
            messages=(*self.messages, Message("user", text)),
            instructions=self.instructions,
            reasoning_effort=self.effort,
            current_date=self.current_date,
        )
        rules = TurnRules() if self.uses_grammar else None
        return ChatRequest(conversation, self.sampling, grammar=rules, adapter=self.adapter)

    def record(self, text: str, result: ChatResult) -> None:
        """Remember the user's text and what the model answered, a stopped answer as far as it came."""
        self.messages = (*self.messages, Message("user", text), *result.messages)
        self.last_reasoning = result.reasoning

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash; what to tell the user. Raises HarmoniumError for a
        mistake.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                return HELP
            case "/quit":
                self.has_quit = True
                return ""
            case "/clear":
                self.messages, self.last_reasoning = (), ""
                return "the conversation is forgotten; instructions and effort stay"
            case "/effort":
                return self._set_effort(argument)
            case "/system":
                return self._set_instructions(argument)
            case "/reasoning":
                return self.toggle_reasoning()
            case "/save" | "/save!":
                return self._save(argument, may_replace=name == "/save!")
        raise ConfigError(f"no command {name}{near(name, COMMANDS)} (/help lists them)")

    def toggle_reasoning(self) -> str:
        """Show reasoning from now on, beginning with that of the last answer, or fold it again."""
        self.shows_reasoning = not self.shows_reasoning
        if not self.shows_reasoning:
            return "reasoning is folded"
        return self.last_reasoning or "reasoning will be shown"

    def _set_effort(self, argument: str) -> str:
        if argument:
            self.effort = reasoning_effort(argument)
        return f"reasoning effort is {self.effort}"

    def _set_instructions(self, argument: str) -> str:
        if argument:
            self.instructions = argument
        return f"instructions: {self.instructions or 'none'}"

    def _save(self, argument: str, may_replace: bool) -> str:
        if not argument:
            raise ConfigError("/save needs a file, such as /save talk.json")
        path = expand_home(argument)
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=2) + "\n"
        try:
            write_text(path, text, may_replace)
        except FileExistsError:
            raise ConfigError(f"{path} exists; /save! {argument} replaces it") from None
        return f"saved to {path}"

    def to_json(self) -> dict[str, object]:
        """The conversation as the body of a Chat Completions request."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return {"reasoning_effort": self.effort, "messages": [*messages, *_chat_messages(self.messages)]}

    def load(
        self, path: Path, instructions: str | None = None, effort: ReasoningEffort | None = None
    ) -> None:
        """Take the conversation of a file that `/save` wrote, or of any Chat Completions body.

        instructions, effort: used instead of the file's, where given.
        Raises ConfigError when the file cannot be read as one.
        """
        try:
            body = json.loads(read_text(path))
            if not isinstance(body, Mapping) or "messages" not in body:
                raise ConfigError(f"{path} holds no object with messages, as /save writes it")
            history = messages_from_chat(body["messages"])
            loaded_effort = reasoning_effort(body.get("reasoning_effort", self.effort))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        except HarmonyError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.messages, self.effort = history.messages, effort or loaded_effort
        self.instructions = instructions or history.instructions


def _chat_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Harmony messages as chat messages: reasoning, preambles and the final answer of a turn become one
    message.
    """
    chat: list[dict[str, Any]] = []
    for message in messages:
        if message.role != "assistant":
            chat.append({"role": message.role, "content": message.content})
            continue
        if not chat or chat[-1]["role"] != "assistant":
            chat.append({"role": "assistant", "content": ""})
        name = "reasoning_content" if message.channel == "analysis" else "content"
        chat[-1][name] = chat[-1].get(name, "") + message.content
    return chat
