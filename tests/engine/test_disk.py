"""What a prompt computed is there after a restart, and a file that is not whole is no worse than none."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request, TokenEvent
from harmonium.engine.create import create_engine
from harmonium.engine.disk import BlockFiles
from harmonium.errors import ConfigError
from harmonium.model.batch import SamplingParams
from harmonium.testing import tiny_checkpoint_path
from tests.engine.fake_runner import FakeRunner, expected_answer
from tests.engine.serving import check_empty, collect, greedy, make_engine, prompt_of

DIGEST, PARENT, TOKENS = bytes(range(16)), bytes(16), b"token ids"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[BlockFiles]:
    made = BlockFiles(tmp_path / "cache", 1 << 30)
    yield made
    made.close()


def save(files: BlockFiles, digest: bytes, data: bytes) -> None:
    files.save(digest, "full", PARENT, TOKENS, lambda: data)
    files.flush()


def digest_of(i: int) -> bytes:
    return i.to_bytes(16, "little")


def test_block_comes_back_in_this_process_and_the_next(files: BlockFiles, tmp_path: Path) -> None:
    save(files, DIGEST, b"keys and values")
    assert files.has(DIGEST, "full") and not files.has(DIGEST, "window")
    other = BlockFiles(tmp_path / "cache", 1 << 30)
    for each in (files, other):
        assert each.load(DIGEST, "full", PARENT, TOKENS) == b"keys and values"
    other.close()


def test_folder_is_for_its_owner_alone(files: BlockFiles, tmp_path: Path) -> None:
    save(files, DIGEST, b"data")
    (path,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("where", ["magic", "token ids", "data", "end", "more"])
def test_damaged_file_is_not_used_and_goes(files: BlockFiles, tmp_path: Path, where: str) -> None:
    save(files, DIGEST, bytes(1000))
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    places = {"magic": 0, "token ids": -1000 - 3, "data": -500, "end": -1}
    if where == "more":
        content += b"x"
    elif where == "end":
        del content[-1]
    else:
        content[places[where]] ^= 1
    path.write_bytes(content)
    assert files.load(DIGEST, "full", PARENT, TOKENS) is None
    assert not path.exists() and not files.has(DIGEST, "full") and files.num_damaged == 1


@pytest.mark.parametrize(
    ("kind", "parent", "tokens"),
    [("window", PARENT, TOKENS), ("full", b"p" * 16, TOKENS), ("full", PARENT, b"token idz")],
)
def test_another_chains_block_is_not_taken_for_ours(
    files: BlockFiles, tmp_path: Path, kind: str, parent: bytes, tokens: bytes
) -> None:
    save(files, DIGEST, b"data")
    (path,) = (tmp_path / "cache").iterdir()
    if kind == "window":
        path.rename(path.with_suffix(".window"))
    assert files.load(DIGEST, kind, parent, tokens) is None  # type: ignore[arg-type]


def test_least_recently_used_files_go_first(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 5 * 1100)
    for i in range(4):
        save(files, digest_of(i), bytes(1000))
    assert files.load(digest_of(0), "full", PARENT, TOKENS) is not None
    for i in range(4, 6):
        save(files, digest_of(i), bytes(1000))
    assert [files.has(digest_of(i), "full") for i in range(6)] == [True, False, True, True, True, True]
    assert files.size_bytes <= 5 * 1100
    files.close()
    # The next process knows the order, from the files' times.
    for i, age in ((2, 0), (0, 10), (3, 20), (4, 30), (5, 40)):
        os.utime(tmp_path / f"{digest_of(i).hex()}.full", (1e9 + age, 1e9 + age))
    files = BlockFiles(tmp_path, 5 * 1100)
    save(files, digest_of(9), bytes(1000))
    assert not files.has(digest_of(2), "full") and files.has(digest_of(0), "full")
    files.close()


def test_block_of_another_process_is_found(files: BlockFiles, tmp_path: Path) -> None:
    other = BlockFiles(tmp_path / "cache", 1 << 30)
    save(other, DIGEST, b"theirs")
    other.close()
    assert files.has(DIGEST, "full") and files.load(DIGEST, "full", PARENT, TOKENS) == b"theirs"


def test_what_a_killed_process_was_writing_is_cleared(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"writing-{gone.pid}-{'0' * 32}.full").write_bytes(b"half")
    mine = tmp_path / f"writing-{os.getppid()}-{'1' * 32}.full"
    mine.write_bytes(b"another's, alive")
    BlockFiles(tmp_path, 1 << 30).close()
    assert list(tmp_path.iterdir()) == [mine]


def test_full_disk_loses_the_block_and_nothing_else(
    files: BlockFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    save(files, DIGEST, b"data")
    assert not list((tmp_path / "cache").iterdir()) and not files.has(DIGEST, "full")
    monkeypatch.undo()
    save(files, DIGEST, b"data")
    assert files.load(DIGEST, "full", PARENT, TOKENS) == b"data"


def test_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache folder .*file.* cannot be used"):
        BlockFiles(tmp_path / "file" / "cache", 1 << 30)
    with pytest.raises(ConfigError, match="cache_limit_bytes is 0; expected 1"):
        EngineConfig(cache_limit_bytes=0)


# ---- engines


async def ask(
    folder: Path, requests: list[Request], **fields: object
) -> tuple[list[list[TokenEvent]], LocalEngine]:
    """Every request in turn, by an engine of its own over the folder."""
    engine = make_engine(FakeRunner(), block_files=BlockFiles(folder, 1 << 30), **fields)  # type: ignore[arg-type]
    answers = [await collect(engine, request) for request in requests]
    await engine.close()
    check_empty(engine)
    return answers, engine


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token.token_id for event in events for token in event.tokens]


@pytest.mark.parametrize("length", [33, 64, 65, 200, 500])
def test_prompt_is_cached_after_a_restart(tmp_path: Path, length: int) -> None:
    prompt = prompt_of(length)
    first, _ = asyncio.run(ask(tmp_path, [greedy(prompt, 20)]))
    again, engine = asyncio.run(ask(tmp_path, [greedy(prompt, 20)]))
    assert tokens_of(first[0]) == tokens_of(again[0]) == expected_answer(prompt, 20)
    assert again[0][-1].num_cached_tokens == (length - 1) // 32 * 32
    assert engine.statistics.num_restored_blocks == (length - 1) // 32


def test_next_turn_resumes_behind_the_answer_after_a_restart(tmp_path: Path) -> None:
    prompt = prompt_of(100)
    first, _ = asyncio.run(ask(tmp_path, [greedy(prompt, 60)]))
    turn = [*prompt, *tokens_of(first[0]), *prompt_of(30, 5)]
    again, _ = asyncio.run(ask(tmp_path, [greedy(turn, 20)]))
    assert tokens_of(again[0]) == expected_answer(turn, 20)
    assert again[0][-1].num_cached_tokens >= 128


def test_damaged_and_missing_blocks_are_computed_again(tmp_path: Path) -> None:
    prompt = prompt_of(300)
    asyncio.run(ask(tmp_path, [greedy(prompt, 5)]))
    paths = sorted(tmp_path.glob("*.full"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    again, _ = asyncio.run(ask(tmp_path, [greedy(prompt, 5), greedy(prompt, 5)]))
    assert [tokens_of(events) for events in again] == [expected_answer(prompt, 5)] * 2
    # The missing one was kept again; that the other is damaged shows when it is read: then it goes too.
    asyncio.run(ask(tmp_path, [greedy(prompt, 5)]))
    last, _ = asyncio.run(ask(tmp_path, [greedy(prompt, 5)]))
    assert last[0][-1].num_cached_tokens == 288


def test_small_pools_and_many_prompts_stay_right(tmp_path: Path) -> None:
    """More is stored than fits: restoring takes the place of what is cached, and books balance throughout."""
    prompts = [prompt_of(150 + 20 * seed, seed) for seed in range(6)]
    small = {"num_full_blocks": 12, "num_window_blocks": 8, "context_length": 320, "max_sequences": 3}
    asyncio.run(ask(tmp_path, [greedy(prompt, 10) for prompt in prompts], **small))

    async def together() -> list[list[int]]:
        engine = make_engine(FakeRunner(), block_files=BlockFiles(tmp_path, 1 << 30), **small)  # type: ignore[arg-type]
        found = await asyncio.gather(*(collect(engine, greedy(prompt, 30)) for prompt in prompts))
        await engine.close()
        check_empty(engine)
        assert engine.statistics.num_restored_blocks > 0
        return [tokens_of(events) for events in found]

    assert asyncio.run(together()) == [expected_answer(prompt, 30) for prompt in prompts]


def test_salts_do_not_share_files(tmp_path: Path) -> None:
    prompt = prompt_of(200)
    asyncio.run(ask(tmp_path, [greedy(prompt, 5, cache_salt="a")]))
    again, _ = asyncio.run(ask(tmp_path, [greedy(prompt, 5, cache_salt="b")]))
    assert again[0][-1].num_cached_tokens == 0


def test_real_model_goes_on_from_its_files_with_the_same_answer(tmp_path: Path) -> None:
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(0, 100_000, 300))

    async def run(**fields: object) -> tuple[list[int], int]:
        config = EngineConfig(context_length=512, cache_dir=tmp_path, **fields)  # type: ignore[arg-type]
        engine = create_engine(tiny_checkpoint_path(), config)
        events = await collect(engine, Request("r", prompt, SamplingParams(temperature=0, max_tokens=12)))
        await engine.close()
        return tokens_of(events), events[-1].num_cached_tokens

    first, cold = asyncio.run(run())
    again, warm = asyncio.run(run())
    assert (cold, warm) == (0, 288) and again == first
    # Other numbers, another folder.
    _, other = asyncio.run(run(weights="bf16"))
    assert other == 0 and len(list(tmp_path.iterdir())) == 2
    small, cold = asyncio.run(run(kv_cache="int8"))
    assert cold == 0 and len(list(tmp_path.iterdir())) == 3
    assert asyncio.run(run(kv_cache="int8")) == (small, 288)
