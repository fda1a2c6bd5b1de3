"""The recipe's rows, what they begin from, and a packed file that is the trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from demo.embedding import structured_embedding  # noqa: E402
from demo.export import pack  # noqa: E402
from demo.recipe import ROW_LENGTH, ROWS, Recipe  # noqa: E402
from harmonium.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from harmonium.checkpoint.names import canonical_tensors  # noqa: E402
from harmonium.demo import demo_checkpoint_path  # noqa: E402
from harmonium.finetune.compact import CompactModel  # noqa: E402
from harmonium.finetune.export import export_checkpoint  # noqa: E402
from harmonium.finetune.settings import read_settings  # noqa: E402
from harmonium.harmony.vocabulary import vocabulary  # noqa: E402
from harmonium.testing import tiny_config  # noqa: E402

REPOSITORY = Path(__file__).parents[2]


def test_embedding_shares_letters_and_digits_between_forms() -> None:
    encode = vocabulary().encode
    texts = (" Paris", "Paris", "7", "17", " the")
    rows = structured_embedding([-1, *(encode(text)[0] for text in texts)], 256)
    same = torch.cosine_similarity(rows[1], rows[2], dim=0)
    other = torch.cosine_similarity(rows[1], rows[5], dim=0)
    assert same > 0.8 > other + 0.3
    ones = slice(128, 138)  # the digits' place in the row
    assert torch.equal(rows[3][ones], rows[4][ones])


def test_rows_are_the_same_for_the_same_numbers() -> None:
    recipe = Recipe()
    first = recipe.rows(700, 1, 0)
    assert first == recipe.rows(700, 1, 0)
    assert first != recipe.rows(700, 0, 0) and first != recipe.rows(701, 1, 0) != recipe.rows(701, 1, 3)
    assert len(first) == ROWS and {len(row.token_ids) for row in first} == {ROW_LENGTH}


def test_rows_hold_used_tokens_but_for_questions() -> None:
    recipe = Recipe()
    used = set(recipe.used_tokens())
    for row in recipe.rows(3000, 0, 0):
        wanted = [token for token, is_target in zip(row.token_ids, row.is_target, strict=True) if is_target]
        assert used.issuperset(wanted)


def test_recipe_is_read() -> None:
    settings = read_settings(REPOSITORY / "demo" / "recipe.toml", {"out": "runs/demo"})
    assert settings.method == "full" and settings.data == "demo.recipe:Recipe"
    assert (REPOSITORY / str(settings.from_scratch)).is_file()


def test_packed_file_is_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny_config(
        vocabulary_size=201_088, num_layers=2, hidden_size=32, expert_size=32, num_experts=4, window=128
    )
    used = [5, 700, 200_002]
    export_checkpoint(CompactModel(config, used, seed=3).whole(), tmp_path / "trained")
    pack(tmp_path / "trained", used, tmp_path / "model.xz")
    unpacked = demo_checkpoint_path(tmp_path / "model.xz")
    with open_checkpoint(tmp_path / "trained") as trained, open_checkpoint(unpacked) as checkpoint:
        assert checkpoint.config == trained.config
        for name, _, _ in canonical_tensors(config, "mxfp4"):
            np.testing.assert_array_equal(checkpoint.tensor(name), trained.tensor(name), err_msg=name)
