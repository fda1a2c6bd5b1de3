"""Downloads from a fake hub: whole and checked or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.errors import HarmoniumError, HubError
from harmonium.hub import HubName, HubSettings, PullOptions, find_local, pull
from harmonium.hub.part_file import SUFFIX
from tests.hub.conftest import IMPATIENT, MIRROR, NAME, REPO
from tests.hub.fake_hub import COMMIT, LFS_BYTES, FakeHub


def quiet(text: str) -> None:
    """Takes what a download tells."""


def total_bytes(folder: Path) -> int:
    """Of the weights of the Hugging Face layout."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def repository(settings: HubSettings) -> Path:
    return settings.huggingface_cache / "models--openai--gpt-oss-20b"


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{SUFFIX}*")) if folder.exists() else []


def assert_same_model(folder: Path, source: Path) -> None:
    with open_checkpoint(folder) as got, open_checkpoint(source) as expected:
        assert got.config == expected.config
        for name in expected.tensors:
            assert np.array_equal(got.tensor(name), expected.tensor(name)), name


def test_a_pull_fills_the_cache_as_other_programs_expect_it(
    hub: FakeHub, settings: HubSettings, models: Path
) -> None:
    folder = pull(NAME, settings, tell=quiet)
    assert folder == repository(settings) / "snapshots" / COMMIT
    assert_same_model(folder, models / REPO)
    assert (repository(settings) / "refs" / "main").read_text() == COMMIT
    links = [path for path in folder.iterdir() if path.is_symlink()]
    assert len(links) == len(list(folder.iterdir())) == 5  # config, index, three shards
    assert all(not link.readlink().is_absolute() for link in links)
    assert {link.resolve().parent for link in links} == {repository(settings).resolve() / "blobs"}
    assert not parts_of(repository(settings))
    assert find_local(NAME, settings) == folder


def test_nothing_is_fetched_that_is_not_needed(hub: FakeHub, settings: HubSettings) -> None:
    pull(NAME, settings, tell=quiet)
    asked = " ".join(seen.target for seen in hub.seen)
    assert "metal" not in asked and "README" not in asked and "original" not in asked


def test_a_second_pull_fetches_no_weights(hub: FakeHub, settings: HubSettings) -> None:
    first = pull(NAME, settings, tell=quiet)
    before = len(hub.weights_requested())
    assert pull(NAME, settings, tell=quiet) == first
    assert len(hub.weights_requested()) == before


def test_original_layout_is_fetched_when_asked_for(hub: FakeHub, settings: HubSettings, models: Path) -> None:
    folder = pull(NAME, settings, PullOptions(original=True), tell=quiet)
    assert folder.name == "original"
    assert_same_model(folder, models / REPO / "original")
    assert find_local(NAME, settings, original=True) == folder


def test_a_plain_folder_holds_the_files_and_nothing_else(
    hub: FakeHub, settings: HubSettings, models: Path, tmp_path: Path
) -> None:
    target = tmp_path / "here"
    assert pull(NAME, settings, PullOptions(folder=target), tell=quiet) == target
    assert_same_model(target, models / REPO)
    assert not (target / ".harmonium-pull").exists()
    assert not any(path.is_symlink() for path in target.iterdir())
    before = len(hub.weights_requested())
    pull(NAME, settings, PullOptions(folder=target), tell=quiet)
    assert len(hub.weights_requested()) == before


def test_a_folder_with_another_model_is_left_alone(
    hub: FakeHub, settings: HubSettings, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(HubError, match=r"config\.json: is there with other bytes"):
        pull(NAME, settings, PullOptions(folder=tmp_path / "other"), tell=quiet)
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_modelscope_fills_its_own_cache(hub: FakeHub, settings: HubSettings, models: Path) -> None:
    folder = pull(MIRROR, settings, tell=quiet)
    assert folder == settings.modelscope_cache / "models/openai-mirror--gpt-oss-20b/snapshots/master"
    assert_same_model(folder, models / MIRROR.repo)
    assert find_local(MIRROR, settings) == folder
    assert find_local(NAME, settings) == folder, "the same model under its other name"


@pytest.mark.parametrize("name", [NAME, MIRROR], ids=["huggingface", "modelscope"])
def test_a_connection_cut_halfway_resumes_with_the_other_half(
    hub: FakeHub, settings: HubSettings, models: Path, name: HubName
) -> None:
    total = total_bytes(models / name.repo)
    hub.faults.cut_after = total // 2
    with pytest.raises(HubError, match="what came is kept"):
        pull(name, settings, IMPATIENT, tell=quiet)
    assert find_local(name, settings) is None
    hub.faults.cut_after, hub.sent = None, 0
    folder = pull(name, settings, tell=quiet)
    assert_same_model(folder, models / name.repo)
    # All but the pieces of 100,000 bytes that were under way on eight connections.
    assert hub.sent < total // 2 + 9 * 100_000
    assert hub.sent < total


def test_answers_that_break_off_go_on_where_they_stopped(
    hub: FakeHub, settings: HubSettings, models: Path
) -> None:
    hub.faults.short_answers = 12
    folder = pull(NAME, settings, IMPATIENT, tell=quiet)
    assert_same_model(folder, models / REPO)
    assert hub.sent == total_bytes(models / REPO), "no byte twice"


def test_a_server_without_ranges_gives_each_file_in_one_go(
    hub: FakeHub, settings: HubSettings, models: Path
) -> None:
    hub.faults.ranges = False
    assert_same_model(pull(NAME, settings, IMPATIENT, tell=quiet), models / REPO)


def test_a_corrupted_file_is_fetched_again(hub: FakeHub, settings: HubSettings, models: Path) -> None:
    hub.faults.corrupt = 1
    assert_same_model(pull(NAME, settings, tell=quiet), models / REPO)


def test_a_file_that_stays_corrupted_is_named_and_not_kept(hub: FakeHub, settings: HubSettings) -> None:
    hub.faults.corrupt = 1_000_000
    with pytest.raises(HubError, match=r"model-0000.*another checksum"):
        pull(NAME, settings, IMPATIENT, tell=quiet)
    assert find_local(NAME, settings) is None
    assert not (repository(settings) / "snapshots").exists()


def test_a_part_spoiled_between_two_runs_is_fetched_anew(
    hub: FakeHub, settings: HubSettings, models: Path
) -> None:
    hub.faults.cut_after = total_bytes(models / REPO) // 2
    with pytest.raises(HubError):
        pull(NAME, settings, IMPATIENT, tell=quiet)
    hub.faults.cut_after = None
    for part in repository(settings).rglob(f"*{SUFFIX}"):
        with part.open("r+b") as file:
            file.write(b"\xff" * 64)
    assert_same_model(pull(NAME, settings, tell=quiet), models / REPO)


def test_too_little_room_is_said_before_a_byte_is_fetched(
    hub: FakeHub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000_000))
    with pytest.raises(HubError, match=r"are still to come and 70\.0 MB are free there"):
        monkeypatch.setattr("harmonium.hub.download._SPARE_BYTES", 70_000_000)
        pull(NAME, settings, tell=quiet)
    assert not hub.weights_requested()


def test_a_disk_that_fills_up_keeps_what_came(
    hub: FakeHub, settings: HubSettings, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.pwrite, [300_000]

    def full(descriptor: int, data: Any, position: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HubError, match="the disk is full; what came is kept"):
        pull(NAME, settings, IMPATIENT, tell=quiet)
    assert find_local(NAME, settings) is None
    monkeypatch.setattr(os, "pwrite", write)
    assert_same_model(pull(NAME, settings, tell=quiet), models / REPO)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_server_errors_pass(hub: FakeHub, settings: HubSettings, models: Path, status: int) -> None:
    hub.faults.failures, hub.faults.failure_status = 2, status
    assert_same_model(pull(NAME, settings, IMPATIENT, tell=quiet), models / REPO)


def test_server_errors_that_do_not_pass_are_told(hub: FakeHub, settings: HubSettings) -> None:
    hub.faults.failures, hub.faults.failure_status = 1000, 503
    with pytest.raises(HubError, match="answered 503: try later"):
        pull(NAME, settings, IMPATIENT, tell=quiet)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (HubName("huggingface", "openai/gpt-oss-21b"), r"no model 'openai/gpt-oss-21b' on Hugging Face"),
        (HubName("modelscope", "openai-mirror/nothing"), r"no model 'openai-mirror/nothing' on ModelScope"),
        (replace(NAME, revision="v9"), r"openai/gpt-oss-20b has no revision 'v9' on Hugging Face"),
        (replace(MIRROR, revision="v9"), r"\(or no revision 'v9' of it\) on ModelScope"),
        (HubName("huggingface", "someone/small-llama"), r"is a model of type 'llama' \('LlamaForCausalLM'\)"),
        (HubName("huggingface", "someone/gguf-only"), r"holds GGUF files, such as gpt-oss-20b-mxfp4\.gguf"),
    ],
)
def test_what_cannot_be_had_is_named(
    hub: FakeHub, settings: HubSettings, name: HubName, expected: str
) -> None:
    with pytest.raises(HubError, match=expected):
        pull(name, settings, IMPATIENT, tell=quiet)
    assert not parts_of(settings.huggingface_cache)


def test_a_gated_model_says_where_to_ask_and_opens_with_the_token(
    hub: FakeHub, settings: HubSettings
) -> None:
    hub.faults.gated = "hf_secret"
    with pytest.raises(
        HubError, match=r"is gated on Hugging Face.*huggingface\.co/openai/gpt-oss-20b.*HF_TOKEN"
    ):
        pull(NAME, settings, IMPATIENT, tell=quiet)
    pull(NAME, settings, PullOptions(token="hf_secret"), tell=quiet)


def test_the_token_never_leaves_its_host(hub: FakeHub, settings: HubSettings) -> None:
    hub.faults.gated = "hf_secret"
    pull(NAME, replace(settings, huggingface_token="hf_secret"), tell=quiet)
    assert hub.weights_requested()
    for seen in hub.seen:
        assert ("authorization" in seen.headers) == seen.host.startswith("127.0.0.1"), seen


def test_offline_nothing_is_asked(hub: FakeHub, settings: HubSettings) -> None:
    with pytest.raises(HubError, match="is not here, and HF_HUB_OFFLINE is set"):
        pull(NAME, replace(settings, is_offline=True), tell=quiet)
    assert not hub.seen


def test_no_network_names_proxy_mirror_and_the_other_hub(settings: HubSettings) -> None:
    nowhere = replace(settings, huggingface_endpoint="http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached.*HTTPS_PROXY.*HF_ENDPOINT"):
        pull(NAME, nowhere, IMPATIENT, tell=quiet)


def test_two_pulls_at_once_fetch_everything_once(hub: FakeHub, settings: HubSettings, models: Path) -> None:
    told: list[str] = []
    found: list[Path | HarmoniumError] = []

    def work() -> None:
        try:
            found.append(pull(NAME, settings, tell=told.append))
        except HarmoniumError as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and isinstance(found[0], Path)
    assert hub.sent == total_bytes(models / REPO)
    assert sum(line.startswith("downloading") for line in told) == 1


def test_an_interrupt_says_what_is_kept_and_goes_on_upwards(
    hub: FakeHub, settings: HubSettings, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    @contextmanager
    def bar(title: str) -> Iterator[Callable[[int, int], None]]:
        yield interrupted

    told: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("harmonium.hub.download.download_bar", bar)
        pull(NAME, settings, tell=told.append)
    assert "are kept, and the same command goes on from there" in told[-1]
    assert find_local(NAME, settings) is None
    assert_same_model(pull(NAME, settings, tell=quiet), models / REPO)


def test_blobs_that_others_left_in_the_cache_are_used(
    hub: FakeHub, settings: HubSettings, models: Path
) -> None:
    import hashlib

    blobs = repository(settings) / "blobs"
    blobs.mkdir(parents=True)
    for shard in sorted((models / REPO).glob("*.safetensors"))[:2]:
        assert shard.stat().st_size >= LFS_BYTES
        shutil.copy(shard, blobs / hashlib.sha256(shard.read_bytes()).hexdigest())
    assert_same_model(pull(NAME, settings, tell=quiet), models / REPO)
    last = sorted((models / REPO).glob("*.safetensors"))[2]
    assert hub.sent == last.stat().st_size


@pytest.mark.parametrize(
    "path", ["../escape.safetensors", "/etc/passwd", "a//b", "a\\b", "", "x/../../y", "a\0b"]
)
def test_a_hub_cannot_name_files_outside_the_folder(path: str) -> None:
    from harmonium.hub.listing import _path

    with pytest.raises(HubError, match="lists a file called"):
        _path(path, NAME)
