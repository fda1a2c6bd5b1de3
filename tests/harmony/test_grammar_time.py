"""The time limit of compiling grammars is CPU time: a busy machine refuses nobody."""

from __future__ import annotations

import time

import pytest

from harmonium.errors import RequestError
from harmonium.harmony import grammar_compile
from harmonium.harmony.grammar_compile import CompiledText, GrammarLimits, compile_texts
from harmonium.harmony.grammar_text import TextFormat

BUILD = grammar_compile._build


def regex(text: str) -> TextFormat:
    return TextFormat("regex", text)


def test_time_without_a_core_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = BUILD(regex("slow"))

    def waits(form: TextFormat) -> CompiledText:
        time.sleep(0.5)
        return compiled

    monkeypatch.setattr(grammar_compile, "_build", waits)
    monkeypatch.setattr(grammar_compile, "_PATIENCE", 1e6)
    formats = {f"tool {number}": regex(f"waits {number}") for number in range(3)}
    assert set(compile_texts(formats, GrammarLimits(compile_seconds=0.25))) == set(formats)


def test_time_on_a_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = False

    def works(form: TextFormat) -> CompiledText:
        while not is_over:
            pass
        return BUILD(regex("x"))

    monkeypatch.setattr(grammar_compile, "_build", works)
    monkeypatch.setattr(grammar_compile, "_PATIENCE", 1e6)
    try:
        with pytest.raises(RequestError, match=r"tool 'f': its grammar takes more than 0\.2 s to compile"):
            compile_texts({"tool 'f'": regex("works")}, GrammarLimits(compile_seconds=0.2))
    finally:
        is_over = True
