"""Where the lines of an interactive chat come from: a terminal with history and editing, or any stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from harmonium.config import cache_folder
from harmonium.errors import ConfigError

PROMPT = "> "
CONTINUATION = "… "


class LineSource:
    """Lines from a stream that is no terminal. A backslash at the end of a line joins the next to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str:
        """The next line, joined. Raises EOFError at the end."""
        parts: list[str] = []
        while True:
            line = self._stream.readline()
            if not line and not parts:
                raise EOFError
            text = line.rstrip("\r\n")
            if not line or not text.endswith("\\"):
                return "\n".join([*parts, text])
            parts.append(text[:-1])


class TerminalSource:
    """Lines typed on a terminal, with history. Enter sends, Alt-Enter and a trailing backslash start a new
    line.
    """

    def __init__(
        self,
        on_toggle: Callable[[], None],
        history: History | None = None,
        keyboard: Input | None = None,
        display: Output | None = None,
    ) -> None:
        """on_toggle: called for Ctrl-R. history, keyboard, display: None for the user's cache and this
        terminal.
        """
        self._session: PromptSession[str] = PromptSession(
            history=history or user_history(),
            key_bindings=_key_bindings(on_toggle),
            multiline=True,
            prompt_continuation=CONTINUATION,
            input=keyboard,
            output=display,
        )

    def read(self) -> str:
        """What the user typed. Raises EOFError for Ctrl-D on an empty line, KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt(PROMPT)


def _key_bindings(on_toggle: Callable[[], None]) -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-r")
    def toggle(event: KeyPressEvent) -> None:
        run_in_terminal(on_toggle)

    return bindings


def user_history() -> History:
    """Lines of earlier chats from the user's cache; in memory alone where the cache cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat-history"
        file.touch(mode=0o600, exist_ok=True)
        return FileHistory(str(file))
    except (OSError, ConfigError):
        return InMemoryHistory()
