"""`harmonium inspect` on every kind of source: what would run, where it lies, how much memory, how fast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonium import cli
from harmonium.hub import HubSettings, pull
from harmonium.testing import make_tiny_checkpoint
from tests.checkpoint.converted.make import HERE, SIZES
from tests.hub.conftest import NAME, REPO
from tests.hub.fake_hub import FakeHub

Q8 = HERE / "tiny-q8_0.gguf"
DIGEST = "cd" * 32


def folder(home: Path) -> tuple[str, Path]:
    made = make_tiny_checkpoint(home / "model", **SIZES)
    return str(made), made


def gguf(home: Path) -> tuple[str, Path]:
    shutil.copy(Q8, home / "model.gguf")
    return str(home / "model.gguf"), home / "model.gguf"


def ollama(home: Path) -> tuple[str, Path]:
    store = home / ".ollama/models"
    manifest = store / "manifests/registry.ollama.ai/library/gpt-oss/20b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    (store / "blobs").mkdir()
    blob = store / "blobs" / f"sha256-{DIGEST}"
    shutil.copy(Q8, blob)
    return "ollama:gpt-oss:20b", blob


def lm_studio(home: Path) -> tuple[str, Path]:
    place = home / ".lmstudio/models/openai/gpt-oss-20b"
    place.mkdir(parents=True)
    shutil.copy(Q8, place / "gpt-oss-20b.gguf")
    return "lmstudio:openai/gpt-oss-20b", place / "gpt-oss-20b.gguf"


def assert_whole(text: str, record: dict[str, object], place: str) -> None:
    """What runs, with what, from where, in how much memory, how fast."""
    assert f"model        {place} (" in text
    for part in (
        "weights      int8 (",
        "kernels      ",
        "threads      ",
        "attention    native",
        "context      ",
    ):
        assert f"\n{part}" in text, part
    for part in ("experts", "dense weights", "full cache", "total"):
        assert f"\n  {part} " in text, part
    assert "tokens a second for one answer" in text
    memory, speed = record["memory"], record["speed"]
    assert isinstance(memory, dict) and isinstance(speed, dict)
    assert record["fits"] and memory["total_bytes"] > memory["expert_bytes"] > 0
    assert speed["decode_tokens_per_second_at_most"] > 0 and speed["read_bytes_per_second"] > 1e7


def inspected(word: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    assert cli.main(["inspect", word]) == 0
    text = capsys.readouterr().out
    assert cli.main(["inspect", word, "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("make", [folder, gguf, ollama, lm_studio])
def test_what_is_on_this_machine(
    make: Callable[[Path], tuple[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)

    word, place = make(tmp_path)
    text, record = inspected(word, capsys)
    assert_whole(text, record, str(place))
    model = record["model"]
    assert isinstance(model, dict)
    assert model["path"] == str(place)
    assert model["layout"] == ("huggingface" if make is folder else "gguf")
    if make in (folder, gguf):
        assert model["name"] is None and "\nname " not in text
    else:
        assert model["name"] == word and text.startswith(f"name         {word}\n")
    assert ("the numbers of the file's Q8_0" in text) is (make is not folder)


def test_a_name_of_a_hub_before_and_after_the_download(
    hub: FakeHub, settings: HubSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    text, record = inspected(REPO, capsys)
    assert_whole(text, record, f"{REPO} on Hugging Face, not here yet: 1.1 MB to download")
    place = pull(NAME, settings, tell=lambda text: None)
    text, record = inspected(REPO, capsys)
    assert_whole(text, record, str(place))
    assert text.startswith(f"name         {REPO}\n")
