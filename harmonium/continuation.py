"""`harmonium generate`: continue a text or a list of token ids, with no conversation around it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TextIO

from harmonium.engine.protocol import Engine, FinishReason, Request, Token
from harmonium.errors import ConfigError, EngineError
from harmonium.harmony.vocabulary import STOP_TOKEN_IDS, TextDecoder, vocabulary
from harmonium.model.batch import SamplingParams
from harmonium.text_file import read_text


@dataclass(frozen=True, slots=True)
class Continuation:
    """What came after a prompt. tokens: as the engine gave them, the stop token included."""

    prompt_token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason
    num_cached_tokens: int

    def to_json(self) -> dict[str, object]:
        """As `--json` prints it; `logprobs` only where they were asked for."""
        record: dict[str, object] = {
            "text": self.text,
            "token_ids": [token.token_id for token in self.tokens],
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": len(self.prompt_token_ids),
                "completion_tokens": len(self.tokens),
                "cached_tokens": self.num_cached_tokens,
            },
        }
        if any(token.logprob is not None for token in self.tokens):
            record["logprobs"] = [token_json(token) for token in self.tokens]
        return record


def token_json(token: Token) -> dict[str, object]:
    """A token with its log-probability and the alternatives, best first."""
    return {
        "token_id": token.token_id,
        "text": vocabulary().decode([token.token_id]),
        "logprob": token.logprob,
        "top_logprobs": [
            {"token_id": other, "text": vocabulary().decode([other]), "logprob": logprob}
            for other, logprob in token.top_logprobs
        ],
    }


def logprob_table(found: Continuation) -> str:
    """A line for each token: id, log-probability, text, and the alternatives, best first."""
    lines = []
    for token in found.tokens:
        others = "  ".join(
            f"{vocabulary().decode([other])!r} {logprob:.3f}" for other, logprob in token.top_logprobs
        )
        logprob = "" if token.logprob is None else f"{token.logprob:.3f}"
        lines.append(f"{token.token_id:>7} {logprob:>8}  {vocabulary().decode([token.token_id])!r}  {others}")
    return "".join(f"{line.rstrip()}\n" for line in lines)


async def generate(
    engine: Engine,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    out: TextIO | None,
    adapter: str | None = None,
) -> Continuation:
    """Continue the prompt, writing text to `out` (unless None) as it comes. adapter: the LoRA adapter to use.

    A character that is cut between tokens is written when it is whole; special tokens are not written.
    Raises what `Engine.admit` raises, and EngineError when the engine fails on the way.
    """
    request_id = f"generate-{uuid.uuid4().hex}"
    request = Request(request_id, prompt, sampling, stop_token_ids=STOP_TOKEN_IDS, adapter=adapter)
    engine.admit(request)
    decoder = TextDecoder(vocabulary())
    tokens: list[Token] = []
    parts: list[str] = []
    finish_reason: FinishReason = "aborted"
    num_cached = 0
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            tokens += event.tokens
            num_cached = max(num_cached, event.num_cached_tokens)
            text = "".join(decoder.push(token.token_id) for token in event.tokens)
            if event.finish_reason is not None:
                text += decoder.finish()
                finish_reason = event.finish_reason
            if event.finish_reason == "error":
                raise EngineError(event.error or "the engine failed without saying why")
            parts.append(text)
            if out is not None and text:
                out.write(text)
                out.flush()
    return Continuation(prompt, tuple(tokens), "".join(parts), finish_reason, num_cached)


def read_prompt(text: str | None, tokens_file: str | None) -> tuple[str, list[int]]:
    """The prompt's name in messages, and its token ids; `-` reads stdin.

    Raises ConfigError for a file that cannot be used. Needs no model, so that nobody waits for one to load.
    """
    if text is not None:
        return "the prompt", vocabulary().encode(read_text("-") if text == "-" else text)
    assert tokens_file is not None, "the parser demands one of --prompt and --tokens"
    name = "stdin" if tokens_file == "-" else tokens_file
    return name, parse_token_ids(read_text(tokens_file), name)


def checked_prompt(name: str, token_ids: Sequence[int], vocabulary_size: int) -> tuple[int, ...]:
    """The ids, if the model has them all. Raises ConfigError for the first that it lacks, and for none."""
    if not token_ids:
        raise ConfigError(f"{name} holds no token; generate continues at least one")
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocabulary_size), None)
    if wrong is not None:
        raise ConfigError(
            f"{name}: token id {wrong:,} is outside the vocabulary (0 to {vocabulary_size - 1:,})"
        )
    return tuple(token_ids)


def parse_token_ids(text: str, name: str) -> list[int]:
    """A JSON list of integers, or integers between blanks. Raises ConfigError that quotes the first other
    thing.
    """
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name} starts like a JSON list and is none: {error}") from None
        wrong = next((value for value in values if type(value) is not int), None)
        if wrong is not None:
            raise ConfigError(f"{name} holds {json.dumps(wrong)[:40]}; expected token ids")
        return list(values)
    words = text.split()
    bad = next(
        (
            word
            for word in words
            if not word.isascii() or not word.removeprefix("-").isdigit() or len(word) > 12
        ),
        None,
    )
    if bad is not None:
        raise ConfigError(f"{name} holds {bad[:40]!r}; expected token ids")
    return [int(word) for word in words]
