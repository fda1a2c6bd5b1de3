"""A checkpoint's own tokenizer.json beside the vocabulary of the package: they must agree.

Text is always encoded with the package's vocabulary, so a checkpoint that was trained with other ids would
answer nonsense; it is refused by `check_tokenizer_json` before anything runs.

Source of the layout: the `tokenizers` library's JSON, as openai/gpt-oss-20b carries it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from harmonium.errors import CheckpointError
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, PATTERN, SPECIAL_TOKENS, Vocabulary, vocabulary

_RELEASED_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
"""The file that OpenAI released with gpt-oss-20b and gpt-oss-120b; known to agree, so not parsed."""

_OTHER_NAMES = {200_018: "<|endofprompt|>"}
"""Special tokens whose name differs between the released file and o200k_harmony; neither is used."""

_MAX_BYTES = 200_000_000


def check_tokenizer_json(path: Path) -> None:
    """Compare vocabulary, merges and special tokens of a tokenizer.json with ours; return when they agree.

    Raises CheckpointError naming the file, the token and both ids for the first difference, and for a file
    that cannot be read.
    """
    content = _read(path)
    if hashlib.sha256(content).hexdigest() == _RELEASED_SHA256:
        return
    try:
        tokenizer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    check_tokenizer(path, tokenizer)


def check_tokenizer(path: Path, tokenizer: object) -> None:
    """The same for a file that has been read: `tokenizer` is its JSON, `path` names it in errors."""
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if (
        not isinstance(tokenizer, dict)
        or not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
    ):
        raise CheckpointError(f"{path}: model.vocab is missing; expected a table of tokens and ids")
    ours = vocabulary()
    _check_vocabulary(path, model["vocab"], ours)
    _check_merges(path, model.get("merges"), ours)
    _check_added_tokens(path, tokenizer.get("added_tokens", []))


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes; expected at most {_MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _check_vocabulary(path: Path, table: Mapping[str, Any], ours: Vocabulary) -> None:
    special_ids = {name: token_id for token_id, name in chain(SPECIAL_TOKENS.items(), _OTHER_NAMES.items())}
    num_text = 0
    for token, token_id in table.items():
        if token in special_ids:
            _check_id(path, token, token_id, special_ids[token])
            continue
        _check_id(path, token, token_id, _our_id(token, ours))
        num_text += 1
    if num_text != NUM_TEXT_TOKENS:
        written = set(table)
        missing = next(i for i in range(NUM_TEXT_TOKENS) if _printable(ours.token_bytes(i)) not in written)
        raise CheckpointError(
            f"{path}: token {_printable(ours.token_bytes(missing))!r} is missing; expected id {missing} "
            f"({num_text:,} text tokens found, expected {NUM_TEXT_TOKENS:,})"
        )


def _check_id(path: Path, token: str, found: object, expected: int | None) -> None:
    if expected is None:
        raise CheckpointError(
            f"{path}: token {token!r} has id {found!r}; our vocabulary does not have this token"
        )
    if found != expected or isinstance(found, bool):
        raise CheckpointError(f"{path}: token {token!r} has id {found!r}; expected {expected}")


def _check_merges(path: Path, merges: object, ours: Vocabulary) -> None:
    """Each merge must make a token of ours, in the order of ids: that is what byte-pair ranks mean."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.merges is missing; expected a list of pairs")
    last = -1
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(
                f"{path}: model.merges[{number}] is {str(merge)[:80]!r}; expected a pair of tokens"
            )
        merged = _our_id("".join(pair), ours)
        if merged is None:
            raise CheckpointError(
                f"{path}: model.merges[{number}] makes {''.join(pair)!r}; our vocabulary lacks this token"
            )
        if merged < last:
            raise CheckpointError(
                f"{path}: model.merges[{number}] makes {''.join(pair)!r} (id {merged}) after id {last}; "
                f"expected the order of ids"
            )
        last = merged
    if last != NUM_TEXT_TOKENS - 1:
        raise CheckpointError(f"{path}: model.merges ends with id {last}; expected {NUM_TEXT_TOKENS - 1}")


def _check_added_tokens(path: Path, added: object) -> None:
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens is {type(added).__name__}; expected a list")
    names = {}
    for number, entry in enumerate(added):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: added_tokens[{number}] has no content; expected a token")
        names[entry["content"]] = entry.get("id")
    ours = {name: token_id for token_id, name in chain(SPECIAL_TOKENS.items(), _OTHER_NAMES.items())}
    for name, token_id in names.items():
        _check_id(path, name, token_id, ours.get(name))
    for token_id, name in SPECIAL_TOKENS.items():
        if not name.startswith("<|reserved_") and name not in names:
            raise CheckpointError(f"{path}: special token {name!r} is missing; expected id {token_id}")


def write_tokenizer_json(path: Path) -> None:
    """Write our vocabulary as a tokenizer.json that the `tokenizers` and Transformers libraries load.

    Every way to put a token together from two others is listed as a merge, in the order of ids (that gives
    the ranks' meaning to libraries that know only merges). All 1,090 special tokens are named.
    """
    ours = vocabulary()
    tokens = [ours.token_bytes(token_id) for token_id in range(NUM_TEXT_TOKENS)]
    merges = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ours.id_of(left), ours.id_of(right), left, right) for left, right in pairs]
        ordered = sorted(
            (a, b, left, right) for a, b, left, right in known if a is not None and b is not None
        )
        merges += [[_printable(left), _printable(right)] for _, _, left, right in ordered]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": name, **flags} for token_id, name in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {_printable(token): token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _byte_letters() -> str:
    """256 letters: the one that stands for each byte in tokenizer.json. Source: GPT-2's bytes_to_unicode
    table.

    Printable bytes of Latin-1 stand for themselves, the others for the letters from U+0100 on, in their
    order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    moved = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return "".join(moved.get(byte, chr(byte)) for byte in range(256))


_LETTER_OF_BYTE = dict(enumerate(_byte_letters()))
_BYTE_OF_LETTER = {letter: byte for byte, letter in _LETTER_OF_BYTE.items()}


def _printable(token: bytes) -> str:
    return token.decode("latin-1").translate(_LETTER_OF_BYTE)


def _our_id(token: str, ours: Vocabulary) -> int | None:
    try:
        return ours.id_of(bytes(_BYTE_OF_LETTER[letter] for letter in token))
    except KeyError:
        return None
