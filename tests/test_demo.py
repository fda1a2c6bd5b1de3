"""The demo model travels whole, is unpacked once, and answers."""

from __future__ import annotations

import json
import lzma
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harmonium import LLM, SamplingParams
from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.checkpoint.checkpoint import open_checkpoint
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.demo import CONFIG_TEXT, PACKED_FILE, USED_TOKENS, VOCABULARY_TENSORS, demo_checkpoint_path
from harmonium.errors import CheckpointError, ConfigError

MAX_PACKED_BYTES = 12_000_000
GREEDY = SamplingParams(temperature=0.0, max_tokens=200)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packed file of two vocabulary tensors and a norm; the cache is an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = encode_bfloat16(np.arange(12, dtype=np.float32).reshape(4, 3))
    tensors = [(name, "BF16", rows) for name in VOCABULARY_TENSORS]
    tensors.append(("model.norm.weight", "BF16", encode_bfloat16(np.ones(3, np.float32))))
    config = json.dumps({"vocab_size": 9}).encode()
    tensors.append((CONFIG_TEXT, "U8", np.frombuffer(config, np.uint8)))
    tensors.append((USED_TOKENS, "I32", np.array([2, 3, 7], np.int32)))
    write_safetensors(tmp_path / "plain", tensors)
    path = tmp_path / "model.xz"
    path.write_bytes(lzma.compress((tmp_path / "plain").read_bytes()))
    return path


def _embedding(folder: Path) -> list[float]:
    from harmonium.checkpoint.safetensors import SafetensorsFile

    file = SafetensorsFile(folder / "model.safetensors")
    entry = file.entries[VOCABULARY_TENSORS[0]]
    values = decode_bfloat16(file.view(entry.dtype, entry.shape, entry.offset))[:, 0].tolist()
    file.close()
    assert set(file.entries) == {*VOCABULARY_TENSORS, "model.norm.weight"}
    return list(values)


def test_unused_tokens_share_the_first_row(packed: Path) -> None:
    assert _embedding(demo_checkpoint_path(packed)) == [0, 0, 3, 6, 0, 0, 0, 9, 0]


def test_the_second_call_writes_nothing(packed: Path) -> None:
    folder = demo_checkpoint_path(packed)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_checkpoint_path(packed) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_threads_that_unpack_at_once_all_get_a_whole_folder(packed: Path) -> None:
    found: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: found.append(_embedding(demo_checkpoint_path(packed))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 0, 3, 6, 0, 0, 0, 9, 0]] * 8


def test_a_damaged_file_is_refused_and_leaves_nothing(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 0xFF
    packed.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        demo_checkpoint_path(packed)
    cache = packed.parent / "cache"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_missing_file_says_so(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="not in this installation"):
        demo_checkpoint_path(packed.with_name("nothing.xz"))


def test_a_cache_that_cannot_be_written_says_so(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        demo_checkpoint_path(packed)


def test_another_version_gets_another_folder(packed: Path) -> None:
    first = demo_checkpoint_path(packed)
    packed.write_bytes(lzma.compress((packed.parent / "plain").read_bytes(), preset=0))
    assert demo_checkpoint_path(packed) != first


def test_the_packed_model_is_small_and_of_the_family() -> None:
    assert PACKED_FILE.stat().st_size <= MAX_PACKED_BYTES
    with open_checkpoint(demo_checkpoint_path()) as checkpoint:
        config = checkpoint.config
    assert config.vocabulary_size == 201_088 and config.window == 128
    assert set(config.layer_kinds) == {"window", "full"}
    assert config.rope.factor == 32.0 and config.num_experts > config.num_active_experts > 1


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(demo_checkpoint_path(), context_length=1024, max_sequences=1, threads=1) as llm:
        yield llm


@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is 47 + 385?", "432"), ("What is 12 * 7?", "84"), ("Reverse the word stone.", "enots")],
)
def test_the_demo_model_answers(demo: LLM, question: str, answer: str) -> None:
    for grammar in (False, True):
        result = demo.chat(question, sampling=GREEDY, current_date="2026-11-25", grammar=grammar)
        assert result.content == answer and result.reasoning


def test_the_demo_model_calls_a_tool(demo: LLM) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "get_weather", "description": "Get the weather of a city.", "parameters": city}
    result = demo.chat(
        "What is the weather in Paris?",
        tools=[{"type": "function", "function": tool}],
        sampling=GREEDY,
        current_date="2026-11-25",
        grammar=False,
    )
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]


def test_the_demo_model_says_what_it_cannot_do(demo: LLM) -> None:
    result = demo.chat("Who wrote Hamlet?", sampling=GREEDY, current_date="2026-11-25")
    assert "small demo model" in result.content
