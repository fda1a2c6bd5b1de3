"""Which folder is meant and which files hold the weights: every wrong path ends in one clear line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from harmonium.checkpoint.shards import INDEX_NAME, find_folder, find_shards, model_name
from harmonium.errors import CheckpointError, ConfigError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")


def index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_that_holds_both_layouts_is_read_as_hugging_faces(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("config.json", "m.safetensors")))
    touch(*(tmp_path / "original" / name for name in ("config.json", "model.safetensors")))
    assert find_folder(tmp_path) == tmp_path


def test_original_is_found_where_the_folder_above_has_no_weights(tmp_path: Path) -> None:
    touch(*(tmp_path / "original" / name for name in ("config.json", "model.safetensors")))
    assert find_folder(tmp_path) == tmp_path / "original"
    touch(tmp_path / "config.json", tmp_path / INDEX_NAME)
    assert find_folder(tmp_path) == tmp_path / "original"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX_NAME])
def test_a_file_stands_for_its_folder(tmp_path: Path, name: str) -> None:
    touch(*(tmp_path / each for each in ("config.json", "model.safetensors", INDEX_NAME)))
    assert find_folder(tmp_path / name) == tmp_path


def test_a_model_name_of_the_hub_says_how_to_download_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"'openai/gpt-oss-20b' is not a folder here.*harmonium pull openai/gpt-oss-20b"
    ):
        find_folder(Path("openai/gpt-oss-20b"))


def test_a_missing_path_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' does not exist; expected the folder"):
        find_folder(tmp_path / "nowhere")


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a link to something that does not exist"):
        find_folder(tmp_path / "link")


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000])
def test_a_path_that_cannot_exist_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        find_folder(Path(text))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="pickles are never loaded"):
        find_folder(tmp_path / name)


def test_a_gguf_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(20))
        with pytest.raises(CheckpointError, match="this is a GGUF file; expected safetensors here"):
            find_folder(tmp_path / name)


def test_another_file_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "README.md")
    with pytest.raises(CheckpointError, match="is not part of a checkpoint"):
        find_folder(tmp_path / "README.md")


def test_a_pipe_in_place_of_a_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe, socket or device"):
        find_folder(tmp_path / "pipe")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_folder(tmp_path)


def test_the_folder_of_a_download_cache_names_the_folder_inside(tmp_path: Path) -> None:
    touch(tmp_path / "snapshots" / "abc" / "config.json")
    with pytest.raises(CheckpointError, match=r"give the folder .*snapshots/abc"):
        find_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors; is the download complete"):
        find_shards(tmp_path)


def test_a_folder_with_pickles_alone_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin: pickles are never loaded"):
        find_shards(tmp_path)


def test_a_folder_with_gguf_alone_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="this is a GGUF file; expected safetensors here"):
        find_shards(tmp_path)


def test_the_single_file_comes_before_the_index(tmp_path: Path) -> None:
    touch(tmp_path / "model.safetensors", tmp_path / INDEX_NAME)
    assert find_shards(tmp_path) == {tmp_path / "model.safetensors": None}


def test_files_without_an_index_are_all_taken(tmp_path: Path) -> None:
    names = ["model--00001-of-00002.safetensors", "model--00002-of-00002.safetensors"]
    touch(*(tmp_path / name for name in [*names, ".part.safetensors"]))
    assert list(find_shards(tmp_path)) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "",
        ".",
        "..",
        "x\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(CheckpointError, match="expected the name of a file in this folder"):
        find_shards(index(tmp_path, {"t": name}))


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file"):
        find_shards(index(tmp_path, {"t": "pytorch_model.bin"}))


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 't' is in 'x\.safetensors', which does not exist"):
        find_shards(index(tmp_path, {"t": "x.safetensors"}))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_a_weight_map_of_the_wrong_type_is_refused(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError, match="weight_map is"):
        find_shards(index(tmp_path, weight_map))


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text("weights")
    with pytest.raises(CheckpointError, match=r"index\.json: is not JSON"):
        find_shards(tmp_path)


def test_shards_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    touch(blob)
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").symlink_to("../../blobs/abc")
    assert find_shards(index(folder, {"t": "x.safetensors"})) == {folder / "x.safetensors": ["t"]}
    shutil.rmtree(tmp_path / "blobs")
    assert list(find_shards(folder)) == [folder / "x.safetensors"]  # opening it says that the link is broken


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("mine/gpt-oss-20b", "gpt-oss-20b"),
        ("mine/gpt-oss-20b/original", "gpt-oss-20b"),
        ("hub/models--openai--gpt-oss-20b/snapshots/0123abcd", "openai/gpt-oss-20b"),
        ("hub/models--openai--gpt-oss-20b/snapshots/0123abcd/original", "openai/gpt-oss-20b"),
        ("models/openai-mirror--gpt-oss-20b/snapshots/master", "openai-mirror/gpt-oss-20b"),
        ("x/snapshots/y", "y"),
    ],
)
def test_a_model_in_a_cache_has_its_repositorys_name(folder: str, expected: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / folder) == expected
