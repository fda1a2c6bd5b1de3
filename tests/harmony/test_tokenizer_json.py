"""A checkpoint's tokenizer.json agrees with our vocabulary, or loading stops with the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmonium.errors import CheckpointError
from harmonium.harmony import check_tokenizer_json, vocabulary, write_tokenizer_json
from harmonium.harmony.tokenizer_json import check_tokenizer

Content = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer_json(path)
    return path


@pytest.fixture(scope="module")
def content(written: Path) -> Content:
    loaded: Content = json.loads(written.read_text(encoding="utf-8"))
    return loaded


def test_our_own_file_agrees(written: Path, content: Content) -> None:
    check_tokenizer_json(written)
    assert len(content["model"]["vocab"]) == 199_998
    assert len(content["model"]["merges"]) == 446_189, "as many as the file released with gpt-oss-20b has"
    assert content["model"]["merges"][0] == ["Ġ", "Ġ"]


def test_tokenizers_library_encodes_as_we_do(written: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with the extra [oracle]")
    theirs = tokenizers.Tokenizer.from_file(str(written))
    for text in ("Hello, world! It's größe 12345.", "日本語 🫠\n\n  x = {'a': 1}\t", "  \n \r\n a"):
        assert theirs.encode(text, add_special_tokens=False).ids == vocabulary().encode(text)
    assert theirs.encode("<|start|>", add_special_tokens=False).ids == [200_006]


def refused(content: Content, change: Callable[[Content], None]) -> str:
    """The complaint about a tokenizer after a change to a copy of it."""
    model = content["model"]
    changed = {
        **content,
        "added_tokens": [dict(entry) for entry in content["added_tokens"]],
        "model": {**model, "vocab": dict(model["vocab"]), "merges": list(model["merges"])},
    }
    change(changed)
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: ") as caught:
        check_tokenizer(Path("tokenizer.json"), changed)
    return str(caught.value)


def swap_ids(content: Content) -> None:
    vocab = content["model"]["vocab"]
    vocab["Hello"], vocab["Ġthe"] = vocab["Ġthe"], vocab["Hello"]


def test_file_that_disagrees_is_refused_with_token_and_both_ids(content: Content) -> None:
    hello, the = vocabulary().id_of(b"Hello"), vocabulary().id_of(b" the")
    complaint = refused(content, swap_ids)
    assert f"token 'Ġthe' has id {hello}; expected {the}" in complaint
    complaint = refused(content, lambda c: c["model"]["vocab"].update({"Ġqqqqzz": 5}))
    assert "token 'Ġqqqqzz' has id 5; our vocabulary does not have this token" in complaint
    complaint = refused(content, lambda c: c["model"]["vocab"].pop("Hello"))
    assert f"token 'Hello' is missing; expected id {hello}" in complaint
    complaint = refused(content, lambda c: c["added_tokens"][8].update(id=200_007))
    assert "token '<|start|>' has id 200007; expected 200006" in complaint
    complaint = refused(content, lambda c: c["added_tokens"].pop(8))
    assert "special token '<|start|>' is missing; expected id 200006" in complaint


def test_merges_that_disagree_are_refused(content: Content) -> None:
    complaint = refused(content, lambda c: c["model"]["merges"].reverse())
    assert "expected the order of ids" in complaint
    complaint = refused(content, lambda c: c["model"]["merges"].insert(0, ["qq", "zzqq"]))
    assert "model.merges[0] makes 'qqzzqq'; our vocabulary lacks this token" in complaint
    complaint = refused(content, lambda c: c["model"]["merges"].insert(3, "one"))
    assert "model.merges[3] is 'one'; expected a pair of tokens" in complaint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "model.vocab is missing"),
        ("{}", "model.vocab is missing"),
        ('{"model": {"vocab": []}}', "model.vocab is missing"),
        ('{"model": {"vocab": {}, "merges": []}}', "token '!' is missing; expected id 0"),
        ('{"model": {"vocab": {" ": 220}, "merges": []}}', "our vocabulary does not have this token"),
    ],
)
def test_file_of_another_form_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        check_tokenizer_json(path)


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        check_tokenizer_json(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="directory"):
        check_tokenizer_json(tmp_path)
