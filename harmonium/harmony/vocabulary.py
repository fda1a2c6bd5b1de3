"""The vocabulary of the gpt-oss models (o200k_harmony): text <-> token ids.

201,088 ids: 0..199,997 are text (o200k_base), 199,998..201,087 are special. Text becomes text ids only: no
call here turns the letters "<|end|>" into the special token 200007. The ranks travel inside the package
(`o200k_base.xz`, packed by tools/pack_vocabulary.py, licence in o200k_base.LICENSE), so nothing is fetched.

Source: ids and pattern as openai/harmony:src/tiktoken_ext/public_encodings.rs gives them.
"""

from __future__ import annotations

import codecs
import lzma
import re
import threading
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import tiktoken

NUM_TEXT_TOKENS = 199_998
VOCABULARY_SIZE = 201_088

START_OF_TEXT = 199_998
END_OF_TEXT = 199_999
RETURN = 200_002
CONSTRAIN = 200_003
CHANNEL = 200_005
START = 200_006
END = 200_007
MESSAGE = 200_008
CALL = 200_012

STOP_TOKEN_IDS = frozenset({RETURN, CALL})
"""The tokens that end an assistant's action. <|end|> is not one: the model goes on with its next message."""

_NAMED_SPECIALS = {
    START_OF_TEXT: "<|startoftext|>",
    END_OF_TEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
}
SPECIAL_TOKENS: dict[int, str] = {
    token_id: _NAMED_SPECIALS.get(token_id, f"<|reserved_{token_id}|>")
    for token_id in range(NUM_TEXT_TOKENS, VOCABULARY_SIZE)
}

PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut into pieces before byte pairs are merged."""

# `\s+(?!\S)` makes tiktoken's regex engine push one frame a character; near a million it panics. Longer runs
# of blanks (without line ends, which another branch takes) are cut out here and encoded as the piece they
# are.
_LONG_RUN = 10_000
_BLANK = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANK_RUN = re.compile(f"(?<![{_BLANK}])[{_BLANK}]{{{_LONG_RUN},}}")
_SPACE = re.compile(f"[\r\n{_BLANK}]")


class Vocabulary:
    """Encodes and decodes. Immutable and safe to share between threads; get the one instance from
    `vocabulary()`.
    """

    def __init__(self, token_bytes: list[bytes]) -> None:
        """token_bytes: the bytes of each text token, in the order of ids."""
        self._token_bytes = token_bytes
        ranks = {token: token_id for token_id, token in enumerate(token_bytes)}
        self._ranks = ranks
        self.encoding = tiktoken.Encoding(
            "o200k_harmony",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: token_id for token_id, name in SPECIAL_TOKENS.items()},
        )
        self._whole_piece: tiktoken.Encoding | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of the text, all below 199,998, also where it spells a special token. Lone surrogates become
        U+FFFD.
        """
        if len(text) < _LONG_RUN:
            return self.encoding.encode_ordinary(text)
        ids: list[int] = []
        position = 0
        for run in _BLANK_RUN.finditer(text):
            start, end = run.span()
            if end < len(text):
                if _SPACE.match(text, end):
                    continue  # the branch for line ends takes the whole run, without frames
                end -= 1  # the last blank belongs to what follows
            ids += self.encoding.encode_ordinary(text[position:start])
            ids += self._encode_piece(text[start:end])
            position = end
        return ids + self.encoding.encode_ordinary(text[position:])

    def _encode_piece(self, text: str) -> list[int]:
        if self._whole_piece is None:  # two threads may both build it; either result serves
            self._whole_piece = tiktoken.Encoding(
                "o200k_piece", pat_str=r"(?s:.+)", mergeable_ranks=self._ranks, special_tokens={}
            )
        return self._whole_piece.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a text token; b"" for a special or unknown id."""
        return self._token_bytes[token_id] if 0 <= token_id < NUM_TEXT_TOKENS else b""

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the ids: special tokens as their names, ids out of range and broken UTF-8 as U+FFFD."""
        parts = []
        for token_id in token_ids:
            if 0 <= token_id < NUM_TEXT_TOKENS:
                parts.append(self._token_bytes[token_id])
            else:
                parts.append(SPECIAL_TOKENS.get(token_id, "\ufffd").encode())
        return b"".join(parts).decode("utf-8", errors="replace")

    def id_of(self, token: bytes) -> int | None:
        """The id of a text token with exactly these bytes, None where there is none."""
        return self._ranks.get(token)


class TextDecoder:
    """Bytes of text tokens -> text, one token at a time; a character cut between tokens waits."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty. Special and unknown ids add nothing."""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD where a character was left incomplete, else ""; the decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


_lock = threading.Lock()


def vocabulary() -> Vocabulary:
    """The vocabulary, built on the first call (about 0.2 s) and shared from then on. Safe from any thread."""
    with _lock:
        return _load()


@lru_cache(maxsize=1)
def _load() -> Vocabulary:
    packed = Path(__file__).with_name("o200k_base.xz").read_bytes()
    content = lzma.decompress(packed)
    lengths = content[:NUM_TEXT_TOKENS]
    ends = list(accumulate(lengths, initial=NUM_TEXT_TOKENS))
    assert ends[-1] == len(content), "o200k_base.xz is damaged"
    return Vocabulary([content[start:end] for start, end in pairwise(ends)])
