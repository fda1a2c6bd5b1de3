"""Formats -> matchers of llguidance, bounded in size and time, on threads of its own; what it gave is kept.

Source: guidance-ai/llguidance:docs/json_schema.md and docs/syntax.md.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from harmonium.errors import EngineBusy, RequestError
from harmonium.harmony.grammar_text import JSON_OBJECT, TextFormat
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, RETURN, VOCABULARY_SIZE, vocabulary

MASK_WORDS = -(-VOCABULARY_SIZE // 32)
"""uint32 words of a mask: a bit for every token id."""

_MAX_COUNT = 10_000
"""Largest {n} of a regular expression: what x{n} forces is worked out in n squared steps (60 ms here)."""

_WHITESPACE = r"[ ]{1,2}|\r?\n[ \t]{0,64}"
"""Between JSON tokens: as compact and as pretty-printed JSON have it. Without a bound, models have been seen
to write line ends until the context was full."""

_NO_LEAD = re.compile(r"(?:at \d+\(\d+\): |failed to parse grammar: )")
_UNENFORCED = re.compile(r"Unimplemented keys: (\[.*?\])")
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])*/')
_SPECIAL_TOKEN = re.compile(r"<[|\[\w]")
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """max_definition_bytes: of one schema, expression or grammar. compile_seconds: CPU
    time for all of a turn, which a busy machine does not lengthen.
    """

    max_definition_bytes: int = 256 * 1024
    compile_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class GrammarWarning:
    """Something that is not enforced. subject: where, such as "tool 'f'"; keywords: which of its schema."""

    subject: str
    keywords: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        what = ", ".join(self.keywords) if self.keywords else "the schema"
        return f"{self.subject}: {what} not enforced ({self.reason})"


@dataclass(frozen=True, slots=True)
class CompiledText:
    """A format ready for use by any number of messages at once. reasons: why parts of it are not enforced."""

    prototype: LLMatcher
    reasons: tuple[str, ...] = ()

    def start(self) -> LLMatcher:
        """A matcher of one's own, at the beginning of the text (some 10 us)."""
        return self.prototype.deep_copy()

    def warning(self, subject: str) -> GrammarWarning | None:
        """What is not enforced, None where all is."""
        if not self.reasons:
            return None
        keywords: list[str] = []
        for reason in self.reasons:
            match = _UNENFORCED.search(reason)
            if match:
                keywords += json.loads(match[1])
            keywords += [word for word in ("minProperties", "maxProperties", "oneOf") if _names(reason, word)]
        return GrammarWarning(subject, tuple(dict.fromkeys(keywords)), "; ".join(self.reasons))


def _names(reason: str, keyword: str) -> bool:
    return keyword in reason or (keyword.endswith("Properties") and "min/maxProperties" in reason)


class _Cache:
    """What was compiled lately. A matcher's bytes are not known; those of its definition stand for them."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[TextFormat, CompiledText] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, form: TextFormat) -> CompiledText | None:
        with self._lock:
            found = self._entries.get(form)
            if found is not None:
                self._entries.move_to_end(form)
            return found

    def put(self, form: TextFormat, compiled: CompiledText) -> None:
        with self._lock:
            if form not in self._entries:
                self._bytes += len(form.definition)
            self._entries[form] = compiled
            self._entries.move_to_end(form)
            while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
                oldest, _ = self._entries.popitem(last=False)
                self._bytes -= len(oldest.definition)


_PATIENCE = 6.0
"""So many times compile_seconds a compilation may wait for a core or a thread, by the clock on the wall."""

_cache = _Cache(max_entries=512, max_bytes=2 * 1024 * 1024)
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="harmonium-grammar")


def compile_texts(
    formats: Mapping[str, TextFormat], limits: GrammarLimits | None = None
) -> dict[str, CompiledText]:
    """Compile the formats of a turn, none of them free text. Keys name them in errors ("tool 'f'").

    Blocks up to the limit of time, so not for an event loop. Raises RequestError for a format that cannot be
    enforced (or, where it is not strict, not even in part), that is too large or takes too long; EngineBusy
    when others' formats keep the compiling threads busy.
    """
    limits = limits or GrammarLimits()
    if formats:
        tokenizer()  # built once in a process, so not out of the time of the request that came first
    done: dict[str, CompiledText] = {}
    running: dict[str, _Job] = {}
    for subject, form in formats.items():
        size = len(form.definition.encode(errors="replace"))
        if size > limits.max_definition_bytes:
            raise RequestError(
                f"{subject}: its grammar has {size:,} bytes; the limit is {limits.max_definition_bytes:,}"
            )
        found = _cache.get(form)
        if found is not None:
            done[subject] = found
            continue
        running[subject] = _Job(form)
    try:
        for subject, job in running.items():
            done[subject] = _await(job, subject, list(running.values()), limits.compile_seconds)
    finally:
        for job in running.values():
            job.future.cancel()
    return done


class _Job:
    """A compilation in one of the threads."""

    def __init__(self, form: TextFormat) -> None:
        self.form = form
        self._clock: Callable[[], float] | None = None
        self._began = 0.0
        self._spent = 0.0
        self.future: Future[CompiledText] = _threads.submit(self._run)

    def _run(self) -> CompiledText:
        clock = _thread_clock()
        self._began = clock()
        self._clock = clock
        try:
            return _build(self.form)
        finally:
            self._clock = None
            self._spent = clock() - self._began

    @property
    def seconds(self) -> float:
        """CPU time that it has taken so far. Any thread may ask."""
        clock = self._clock
        return self._spent if clock is None else clock() - self._began


def _thread_clock() -> Callable[[], float]:
    """Of the thread that calls, to be read from any thread. Where a system has none: wall-clock time."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


def _await(job: _Job, subject: str, jobs: list[_Job], seconds: float) -> CompiledText:
    """jobs: all of the turn, which share the time."""
    patience = time.monotonic() + _PATIENCE * seconds
    while not wait([job.future], min(0.1, seconds)).done:
        if sum(each.seconds for each in jobs) > seconds:
            raise RequestError(
                f"{subject}: its grammar takes more than {seconds:g} s to compile; the limit is {seconds:g} s"
            )
        if time.monotonic() > patience:  # that is not this request's fault
            raise EngineBusy("the threads that compile grammars are busy")
    try:
        compiled = job.future.result()
    except _RefusedError as error:
        raise RequestError(f"{subject}: its grammar cannot be enforced: {error}") from None
    _cache.put(job.form, compiled)
    return compiled


def remove_special_tokens(mask: npt.NDArray[np.uint32]) -> None:
    """Clear the bits of everything but text tokens, in place."""
    word, bit = divmod(NUM_TEXT_TOKENS, 32)
    mask[word] &= np.uint32((1 << bit) - 1)
    mask[word + 1 :] = 0


class _RefusedError(Exception):
    """llguidance's word about a grammar that it does not take."""


def _build(form: TextFormat) -> CompiledText:
    if form.kind == "regex":
        return CompiledText(_matcher(form, LLMatcher.grammar_from_regex(form.definition)))
    if form.kind == "lark":
        if _SPECIAL_TOKEN.search(_LITERAL.sub("", form.definition)):
            raise _RefusedError("it names special tokens (<...>), and a text can hold none")
        return CompiledText(_matcher(form, LLMatcher.grammar_from_lark(form.definition)))
    try:
        return CompiledText(_matcher(form, _json_grammar(form.definition)))
    except _RefusedError as error:
        if form.is_strict:
            raise
        exact = str(error)
    try:
        matcher = _matcher(form, _json_grammar(form.definition, lenient=True, coerce_one_of=True))
        return CompiledText(matcher, tuple(matcher.get_grammar_warnings()) or (exact,))
    except _RefusedError as error:
        matcher = _matcher(JSON_OBJECT, _json_grammar(JSON_OBJECT.definition))
        return CompiledText(matcher, tuple(dict.fromkeys((exact, str(error)))))


def _json_grammar(schema: str, lenient: bool = False, coerce_one_of: bool = False) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_pattern": _WHITESPACE,
                "json_allow_general_unicode_escapes": True,
                "lenient": lenient,
                "coerce_one_of": coerce_one_of,
            },
        )
    except ValueError as error:  # nested too deeply, or options of its own that are none
        raise _RefusedError(str(error)) from None


def _matcher(form: TextFormat, grammar: str) -> LLMatcher:
    """Raises _RefusedError. Some faults show in the first mask only."""
    for low, high in _COUNT.findall(form.definition):
        if max(int(low[:9]), int(high[:9] or 0)) > _MAX_COUNT:
            raise _RefusedError(
                f"a repetition counts to {max(low, high, key=len)}; the limit is {_MAX_COUNT:,}"
            )
    matcher = LLMatcher(tokenizer(), grammar, log_level=0, limits=_parser_limits())
    if matcher.is_error():
        raise _RefusedError(_shown(matcher.get_error()))
    trial = matcher.deep_copy()
    _check_mask(trial)
    for opening in ("{", '"') if form.is_json else ():  # limits that show where an object's properties come
        if trial.try_consume_tokens(vocabulary().encode(opening)) or trial.is_error():
            _check_mask(trial)
    return matcher


def _check_mask(matcher: LLMatcher) -> None:
    mask = np.zeros(MASK_WORDS, np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    remove_special_tokens(mask)
    if matcher.is_error() or not (mask.any() or matcher.is_accepting()):
        raise _RefusedError(_shown(matcher.get_error()) or "nothing satisfies it")


def _shown(error: str) -> str:
    if error.startswith("NoExtension"):
        return "nothing satisfies it"
    lines = [line.strip() for line in _NO_LEAD.sub("", error).splitlines()]
    text = " ".join(line for line in lines if line and line != "<non-verbose/>")
    return text if len(text) <= 300 else f"{text[:300]}..."


@lru_cache(maxsize=1)
def _parser_limits() -> LLParserLimits:
    # A lexer state takes 1 to 2 kB, so one message's parser stays under 50 MB; the library's own bound is ten
    # times that. Its bounds for a row (2,000 items) and a mask (50,000) stop short of 500 optional properties
    # or 1,000 alternatives; with ours such a mask takes some 20 ms.
    return LLParserLimits(
        max_lexer_states=25_000, max_items_in_row=2_500, step_max_items=150_000, verbose_errors=False
    )


_tokenizer_lock = threading.Lock()


def tokenizer() -> LLTokenizer:
    """The vocabulary as llguidance wants it; built on the first call (about 1.3 s). Safe from any thread."""
    with _tokenizer_lock:
        return _load_tokenizer()


@lru_cache(maxsize=1)
def _load_tokenizer() -> LLTokenizer:
    return lltokenizer_from_encoding(vocabulary().encoding, n_vocab=VOCABULARY_SIZE, eos_token=RETURN)
