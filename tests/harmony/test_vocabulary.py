"""The vocabulary in the package is OpenAI's, and text stays text."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonium.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    END_OF_TEXT,
    MESSAGE,
    NUM_TEXT_TOKENS,
    RETURN,
    SPECIAL_TOKENS,
    START,
    START_OF_TEXT,
    STOP_TOKEN_IDS,
    VOCABULARY_SIZE,
    TextDecoder,
    vocabulary,
)
from tests.harmony.conversations import load_encoding


def test_ranks_are_those_that_openai_publishes() -> None:
    """Written out as o200k_base.tiktoken they have the SHA-256 of that file."""
    lines = [
        base64.b64encode(vocabulary().token_bytes(token_id)) + b" %d\n" % token_id
        for token_id in range(NUM_TEXT_TOKENS)
    ]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    assert digest == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def test_special_tokens_have_the_documented_ids() -> None:
    named = {START_OF_TEXT: "startoftext", END_OF_TEXT: "endoftext", RETURN: "return", CONSTRAIN: "constrain",
             CHANNEL: "channel", START: "start", END: "end", MESSAGE: "message", CALL: "call"}  # fmt: skip
    ids = [199998, 199999, 200002, 200003, 200005, 200006, 200007, 200008, 200012]
    assert sorted(named) == ids
    assert {token_id: f"<|{name}|>" for token_id, name in named.items()}.items() <= SPECIAL_TOKENS.items()
    assert list(SPECIAL_TOKENS) == list(range(NUM_TEXT_TOKENS, VOCABULARY_SIZE))
    assert SPECIAL_TOKENS[201_087] == "<|reserved_201087|>"
    assert len(set(SPECIAL_TOKENS.values())) == 1_090
    assert {200_002, 200_012} == STOP_TOKEN_IDS


def test_special_tokens_are_the_library_s() -> None:
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    encoding = load_encoding(oss)
    for token_id, name in SPECIAL_TOKENS.items():
        assert encoding.encode(name, allowed_special="all") == [token_id]
    beyond = encoding.special_tokens_set - set(SPECIAL_TOKENS.values())
    assert beyond == {"<|reserved_201088|>"}, "the library has one more than the model has rows"


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_text_round_trips_and_never_becomes_special(text: str) -> None:
    ids = vocabulary().encode(text)
    assert all(0 <= token_id < NUM_TEXT_TOKENS for token_id in ids)
    assert vocabulary().decode(ids) == text
    decoder = TextDecoder(vocabulary())
    assert "".join(decoder.push(token_id) for token_id in ids) + decoder.finish() == text


def test_names_of_special_tokens_are_text_when_somebody_types_them() -> None:
    text = "".join(SPECIAL_TOKENS.values())
    ids = vocabulary().encode(text)
    assert max(ids) < NUM_TEXT_TOKENS
    assert vocabulary().decode(ids) == text


def test_encoding_equals_the_library_s() -> None:
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    encoding = load_encoding(oss)
    rng = random.Random(5)
    blanks = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x00", "\x85"]
    alphabet = [
        *blanks,
        "a",
        "B",
        "word",
        "Über",
        "日本",
        "🫠",
        "\u0301",
        "1",
        "234",
        *'./_{"\\',
        "'s",
        "<|end|>",
    ]
    for _ in range(2000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 20)))
        assert vocabulary().encode(text) == encoding.encode(text, disallowed_special=())


def test_lone_surrogate_becomes_a_replacement_character() -> None:
    assert vocabulary().decode(vocabulary().encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize(
    "letter", ["a", " ", "\t", "\n", "\u3000", "^", "=", "é", "漢", "😀", "\u0301", "'", "0"]
)
def test_a_megabyte_of_one_character_encodes_within_seconds(letter: str) -> None:
    """The bound is generous for a busy machine; alone it takes under half a second."""
    text = letter * 1_000_000
    vocabulary().encode(" " * 20_000)  # what long runs of blanks need is built once
    begin = time.process_time()
    ids = vocabulary().encode(text)
    assert time.process_time() - begin < 3
    assert vocabulary().decode(ids) == text


def test_long_runs_of_blanks_encode_as_short_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way around the regex engine's stack, tried with runs of 3 where it starts at 10,000."""
    module = sys.modules[
        "harmonium.harmony.vocabulary"
    ]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "_LONG_RUN", 3)
    monkeypatch.setattr(module, "_BLANK_RUN", re.compile(f"(?<![{module._BLANK}])[{module._BLANK}]{{3,}}"))
    rng = random.Random(1)
    parts = [
        " ",
        "  ",
        "   ",
        " \t",
        "\n",
        "\r",
        "a",
        "B",
        "1",
        ".",
        "/",
        "'s",
        "\u3000",
        "\x1c",
        "\x85",
        "é",
    ]
    for _ in range(5000):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 14)))
        assert vocabulary().encode(text) == vocabulary().encoding.encode_ordinary(text), repr(text)


def test_decoding_anything_gives_text() -> None:
    assert (
        vocabulary().decode([START, *vocabulary().encode("Hello"), -1, 1 << 60])
        == "<|start|>Hello\ufffd\ufffd"
    )
    assert vocabulary().token_bytes(START) == b""
    assert vocabulary().token_bytes(-1) == b""
    assert vocabulary().id_of(b"Hello") == vocabulary().encode("Hello")[0]
    assert vocabulary().id_of(b"\xff\xfe\xfd\xfc") is None


def test_text_decoder_holds_back_half_a_character_and_starts_anew() -> None:
    first, *rest = vocabulary().encode("🫠")
    decoder = TextDecoder(vocabulary())
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"
    assert [decoder.push(token_id) for token_id in [first, *rest]][-1] == "🫠"
    assert decoder.finish() == ""


def test_one_vocabulary_for_all_threads() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "from harmonium.harmony import vocabulary\n"
        "with P(8) as p: print(len({id(v) for v in p.map(lambda _: vocabulary(), range(8))}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda text: tuple(vocabulary().encode(text)), ["größe " * 500] * 8))) == 1


def test_vocabulary_loads_fast() -> None:
    """0.16 s of processor time when this was written; the bound is what a start may cost."""
    code = (
        "import time; begin = time.process_time()\n"
        "from harmonium.harmony import vocabulary; vocabulary().encode('x')\n"
        "print(time.process_time() - begin)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 2
