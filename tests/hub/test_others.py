"""Models of Ollama and LM Studio, by the names that they have there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harmonium import cli, loading
from harmonium.errors import CheckpointError, ConfigError
from harmonium.testing import tiny_config
from tests.checkpoint.gguf_files import converted, fused, metadata_of, write_gguf

CONFIG = tiny_config(vocabulary_size=512, num_layers=2)
DIGEST = "ab" * 32


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ollama's store with gpt-oss:20b in it."""
    store = tmp_path / "ollama"
    manifest = store / "manifests/registry.ollama.ai/library/gpt-oss/20b"
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}"},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    (store / "blobs").mkdir()
    write_gguf(store / "blobs" / f"sha256-{DIGEST}", metadata_of(CONFIG, "gptoss"), fused(CONFIG))
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    return store


def test_an_ollama_name_is_its_blob(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blob = store / "blobs" / f"sha256-{DIGEST}"
    for word in (
        "ollama:gpt-oss:20b",
        "ollama:library/gpt-oss:20b",
        "ollama:registry.ollama.ai/library/gpt-oss:20b",
    ):
        assert loading.find_model(word) == blob
    assert cli.main(["inspect", "ollama:gpt-oss:20b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["layout"] == "gguf" and report["fits"]


@pytest.mark.parametrize("word", ["ollama:gpt-oss", "ollama:gpt-oss:120b"])
def test_a_model_that_ollama_lacks_says_where_it_was_looked_for(word: str, store: Path) -> None:
    with pytest.raises(ConfigError, match=f"Ollama has no model .* in {store}"):
        loading.find_model(word)


@pytest.mark.parametrize(
    "word", ["ollama:", "ollama:../x", "ollama:a/b/c/d", "ollama:x:../y", "lmstudio:../x"]
)
def test_names_that_lead_elsewhere_are_refused(word: str, store: Path) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        loading.find_model(word)


def test_a_store_that_is_damaged_names_the_file(store: Path) -> None:
    (store / "blobs" / f"sha256-{DIGEST}").unlink()
    with pytest.raises(CheckpointError, match=f"sha256-{DIGEST}: is not there"):
        loading.find_model("ollama:gpt-oss:20b")
    manifest = store / "manifests/registry.ollama.ai/library/gpt-oss/20b"
    manifest.write_text(
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../../x"}]}'
    )
    with pytest.raises(CheckpointError, match="digest is"):
        loading.find_model("ollama:gpt-oss:20b")


def test_an_lm_studio_folder_is_its_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".lmstudio/models/openai/gpt-oss-20b"
    folder.mkdir(parents=True)
    write_gguf(folder / "gpt-oss-20b-MXFP4.gguf", metadata_of(CONFIG), converted(CONFIG))
    assert loading.find_model("lmstudio:openai/gpt-oss-20b") == folder
    assert cli.main(["inspect", "lmstudio:openai/gpt-oss-20b"]) == 0
    assert "gpt-oss-20b-MXFP4.gguf (gguf layout, mxfp4 experts)" in capsys.readouterr().out
