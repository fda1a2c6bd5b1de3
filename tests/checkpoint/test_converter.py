"""GGUF files that llama.cpp's own converter made: the tensors, tokens and logits of their source."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.gguf_blocks import encode_q8
from harmonium.checkpoint.gguf_checkpoint import GgufCheckpoint
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, SPECIAL_TOKENS, vocabulary
from harmonium.llm import LLM
from harmonium.model import gguf_weights, weights
from harmonium.testing import make_tiny_checkpoint
from tests.checkpoint.converted.make import HERE, OUTTYPES, SIZES, convert, with_tokenizer

LLAMA_CPP = os.environ.get("HARMONIUM_LLAMA_CPP")

Logits = np.ndarray[Any, np.dtype[np.float32]]

TOKENS = [int(token) for token in np.random.PCG64(0).random_raw(200) % SIZES["vocabulary_size"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("converter") / "source", **SIZES)


def converted(outtype: str) -> Path:
    return HERE / f"tiny-{outtype}.gguf"


def listed_tokens(path: Path) -> list[str]:
    """The array tokenizer.ggml.tokens of a file."""
    data, key = path.read_bytes(), b"tokenizer.ggml.tokens"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    kind, of, count = struct.unpack_from("<IIQ", data, at)
    assert (kind, of) == (9, 8), "an array of strings"
    at += 16
    tokens = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return tokens


def token_bytes(token: str) -> bytes:
    """GPT-2's letters for bytes: those that Latin-1 prints for themselves, else from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = {
        chr(0x100 + at): byte for at, byte in enumerate(byte for byte in range(256) if byte not in plain)
    }
    return bytes(moved.get(letter, ord(letter)) for letter in token)


def assert_converted(got: Checkpoint, source: Checkpoint) -> None:
    """Every tensor is the source's, matrices of Q8_0 files rounded once, as ggml rounds them."""
    assert isinstance(got, GgufCheckpoint)
    assert got.config == source.config
    assert list(got.tensors) == list(source.tensors) and got.ignored == ()
    for name in source.tensors:
        expected = source.tensor(name)
        rows, kind = (None, "") if ".experts." in name else got.stored_rows(name)
        if kind == "Q8_0":
            assert np.array_equal(rows, encode_q8(decode_bfloat16(expected))), name
        else:
            assert np.array_equal(got.tensor(name), expected), name


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_tensors_are_those_of_the_source(outtype: str, source: Path) -> None:
    with open_checkpoint(converted(outtype)) as got, open_checkpoint(source) as expected:
        assert_converted(got, expected)
        kind = got.stored_rows("layers.0.attention.q.weight")[1]
        assert kind == ("BF16" if outtype == "bf16" else "Q8_0")


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_tokens_are_ours(outtype: str) -> None:
    tokens = listed_tokens(converted(outtype))
    assert len(tokens) == SIZES["vocabulary_size"]
    assert all(token_bytes(token) == vocabulary().token_bytes(n) for n, token in enumerate(tokens))


def logits(path: Path, weights: str, tokens: list[int] = TOKENS) -> Logits:
    with LLM(path, weights=weights, context_length=256, threads=1) as llm:
        return llm.logits(tokens)


def typical_error(got: Logits, exact: Logits) -> float:
    """docs/numerics.md: the median over positions, relative to the size of logits."""
    return float(np.median(np.sqrt(np.mean((got - exact) ** 2, axis=1))) / np.sqrt(np.mean(exact**2)))


def test_logits_of_a_bf16_file_are_the_sources_to_the_bit(source: Path) -> None:
    for kind in ("bf16", "int8"):
        assert np.array_equal(logits(converted("bf16"), kind), logits(source, kind))


def test_logits_of_a_q8_file_are_within_what_int8_costs(source: Path) -> None:
    """Its numbers are used as they are: rounded is what `--weights int8` rounds, and the embedding."""
    exact = logits(source, "bf16")
    int8, q8 = (
        typical_error(logits(source, "int8"), exact),
        typical_error(logits(converted("q8_0"), "int8"), exact),
    )
    assert 0 < q8 < 0.05, "the bound of int8 (docs/numerics.md)"
    assert q8 < 1.3 * int8


def converted_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that loading a checkpoint in int8 reads to convert them."""
    counted = 0

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(array: np.ndarray[Any, Any]) -> Any:
            nonlocal counted
            counted += array.nbytes
            return original(array)

        monkeypatch.setattr(module, name, counting)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        spy(weights, "quantize_weight")
        spy(weights, "quantize_unembedding")
        spy(gguf_weights, "q8_to_bf16")
        spy(gguf_weights, "panels_of_q8")
        with open_checkpoint(path) as checkpoint:
            weights.load_weights(checkpoint, "int8")
    return counted


def test_a_start_from_gguf_converts_no_more_than_one_from_the_source(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_source = converted_bytes(source, monkeypatch)
    assert of_source > 0
    assert converted_bytes(converted("bf16"), monkeypatch) == of_source
    assert converted_bytes(converted("q8_0"), monkeypatch) * 32 == of_source * 17, "34 bytes for 32 numbers"


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_experts_and_embedding_stay_in_the_map(outtype: str) -> None:
    with open_checkpoint(converted(outtype)) as checkpoint:
        loaded = weights.load_weights(checkpoint, "int8")
        matrices = [
            array for layer in loaded.layers for array in layer.experts.mapped if array.dtype == np.uint8
        ]
        assert len(matrices) == 6, "gate, up and down of two layers"
        for array in (*matrices, loaded.embedding_VD):
            assert not array.flags.owndata and not array.flags.writeable


@pytest.mark.skipif(
    LLAMA_CPP is None, reason="HARMONIUM_LLAMA_CPP names no folder with llama.cpp's converter"
)
@pytest.mark.parametrize("options", [("--outtype", "q8_0"), ("--outtype", "bf16", "--fuse-qkv")])
def test_the_converter_itself_on_the_real_vocabulary(options: tuple[str, ...], tmp_path: Path) -> None:
    assert LLAMA_CPP is not None
    folder = with_tokenizer(make_tiny_checkpoint(tmp_path / "source", num_layers=2))
    path = convert(Path(LLAMA_CPP), folder, tmp_path / "out.gguf", *options)
    tokens, ours = listed_tokens(path), vocabulary()
    assert all(token_bytes(tokens[n]) == ours.token_bytes(n) for n in range(NUM_TEXT_TOKENS))
    assert {n: tokens[n] for n in SPECIAL_TOKENS} == SPECIAL_TOKENS
    with open_checkpoint(path) as got, open_checkpoint(folder) as expected:
        assert_converted(got, expected)
    prompt = list(range(1000, 1064))
    exact, got_logits = logits(folder, "bf16", prompt), logits(path, "int8", prompt)
    assert typical_error(got_logits, exact) < 1.3 * typical_error(logits(folder, "int8", prompt), exact)
