"""What a word means on a hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonium.errors import ConfigError
from harmonium.hub import HubName, hub_settings, may_be_path, parse_name


@pytest.mark.parametrize(
    ("word", "source", "expected"),
    [
        ("openai/gpt-oss-20b", None, HubName("huggingface", "openai/gpt-oss-20b")),
        ("20b", None, HubName("huggingface", "openai/gpt-oss-20b")),
        ("120b", None, HubName("huggingface", "openai/gpt-oss-120b")),
        ("gpt-oss-120b", None, HubName("huggingface", "openai/gpt-oss-120b")),
        ("openai-mirror/gpt-oss-20b", None, HubName("modelscope", "openai-mirror/gpt-oss-20b")),
        ("20b", "modelscope", HubName("modelscope", "openai-mirror/gpt-oss-20b")),
        ("openai/gpt-oss-120b", "modelscope", HubName("modelscope", "openai-mirror/gpt-oss-120b")),
        ("openai-mirror/gpt-oss-20b", "huggingface", HubName("huggingface", "openai/gpt-oss-20b")),
        ("me/my.model", None, HubName("huggingface", "me/my.model")),
        ("20b@v1.0", None, HubName("huggingface", "openai/gpt-oss-20b", "v1.0")),
        ("me/x@refs/pr/1", None, HubName("huggingface", "me/x", "refs/pr/1")),
    ],
)
def test_a_name_means_a_model_on_one_hub(word: str, source: str | None, expected: HubName) -> None:
    assert parse_name(word, source) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word", ["", "x", "a/b/c", "a//b", "../x", "a/..", "-a/b", "a/b c", "a/b--c", "a/" + "b" * 99]
)
def test_what_can_be_no_name_is_none(word: str) -> None:
    assert parse_name(word) is None


@pytest.mark.parametrize("revision", ["", "../../x", "-x", "a b", "x" * 300])
def test_a_revision_that_could_lead_elsewhere_is_refused(revision: str) -> None:
    with pytest.raises(ConfigError, match="the revision is"):
        parse_name("20b@" + revision)


def test_a_revision_is_given_once() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_name("20b@main", revision="v1")


def test_words_that_read_like_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for word in ("./20b", "/a/b", "~/x", "models/gpt-oss-20b", "tinny"):
        assert may_be_path(word), word
    for word in ("20b", "openai/gpt-oss-20b"):
        assert not may_be_path(word), word


def test_settings_follow_the_variables_of_the_hubs_own_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_TOKEN_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    (tmp_path / "token").write_text("hf_from_file\n")
    settings = hub_settings()
    assert settings.huggingface_cache == tmp_path / "hub"
    assert settings.huggingface_endpoint == "https://mirror.example"
    assert settings.huggingface_token == "hf_from_file"
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = hub_settings()
    assert settings.huggingface_token == "hf_given"
    assert settings.huggingface_cache == tmp_path / "elsewhere"
    assert settings.is_offline


def test_vllms_switch_is_answered_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARMONIUM_SOURCE", raising=False)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert "HARMONIUM_SOURCE=modelscope" in (hub_settings().remark or "")
    monkeypatch.setenv("HARMONIUM_SOURCE", "modelscope")
    settings = hub_settings()
    assert settings.remark is None and settings.source == "modelscope"


@pytest.mark.parametrize(
    ("name", "value"), [("HARMONIUM_SOURCE", "github"), ("HF_ENDPOINT", "mirror.example")]
)
def test_a_variable_that_cannot_be_used_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        hub_settings()
