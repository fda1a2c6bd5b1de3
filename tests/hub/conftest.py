"""A fake hub with a small model in it, and an environment that knows no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonium.hub import HubName, HubSettings, PullOptions, hub_settings, part_file
from harmonium.hub.web import Patience
from harmonium.testing import make_tiny_checkpoint
from tests.hub.fake_hub import FakeHub

REPO = "openai/gpt-oss-20b"
NAME = HubName("huggingface", REPO)
MIRROR = HubName("modelscope", "openai-mirror/gpt-oss-20b")
IMPATIENT = PullOptions(patience=Patience(attempts=3, first_pause_seconds=0.01))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hubs' models: Hugging Face's has both layouts and things that we do not need."""
    folder = tmp_path_factory.mktemp("hub")
    made = make_tiny_checkpoint(folder / REPO, vocabulary_size=512, num_shards=3)
    make_tiny_checkpoint(made / "original", layout="original", vocabulary_size=512)
    (made / "README.md").write_text("# gpt-oss")
    (made / "metal").mkdir()
    (made / "metal" / "model.bin").write_bytes(b"m" * 100_000)
    make_tiny_checkpoint(folder / MIRROR.repo, vocabulary_size=512)
    other = folder / "someone" / "small-llama"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (other / "model.safetensors").write_bytes(b"x" * 9000)
    (folder / "someone" / "gguf-only").mkdir()
    (folder / "someone" / "gguf-only" / "gpt-oss-20b-mxfp4.gguf").write_bytes(b"GGUF" * 2000)
    return folder


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The environment points at it, caches are in tmp_path, and pieces are small."""
    for name in (
        "HF_TOKEN",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HARMONIUM_SOURCE",
        "VLLM_USE_MODELSCOPE",
        "MODELSCOPE_API_TOKEN",
        "HF_TOKEN_PATH",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(part_file, "PIECE_BYTES", 100_000)
    with FakeHub(models) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        yield fake


@pytest.fixture
def settings(hub: FakeHub) -> HubSettings:
    return hub_settings()
