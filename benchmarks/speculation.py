"""Does guessing ahead pay? The same answer with and without guesses, on the real model's steps.

    python benchmarks/speculation.py MODEL [--tokens 256] [--rounds 3] [--file FILE]

A random checkpoint writes no text, so the answer is given: the model computes every step in full (its logits,
its draws), then the next token of a prepared text is taken in place of what it drew. Two answers are timed,
with speculation "off" and "ngram" in turn:

copy: a source file of 300 lines is in the prompt, and the answer is the file with one name changed.
prose: text that does not repeat itself, where guesses fail.

Random weights choose experts more evenly than trained ones do, so a guessed token costs more bytes here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine
from harmonium.engine.statistics import EngineStatistics
from harmonium.harmony.vocabulary import vocabulary
from harmonium.model.batch import Batch, SampledToken, SamplingParams, StepResult
from harmonium.model.runner import Runner

ROOT = Path(__file__).resolve().parent.parent


class Dictation:
    """A Runner that computes what another computes, and then says the next token of a given text."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.text: list[int] = []
        self.config, self.max_batch_tokens = runner.config, runner.max_batch_tokens
        self.allocate_cache, self.close = runner.allocate_cache, runner.close

    def step(self, batch: Batch) -> StepResult:
        result = self._runner.step(batch)
        places = [int(batch.position_T[row]) + 1 for row in batch.logit_row_R]
        tokens = tuple(
            None if token is None else SampledToken(self.text[min(place, len(self.text) - 1)])
            for place, token in zip(places, result.tokens, strict=True)
        )
        return StepResult(tokens, result.logits_RV)


@dataclass(frozen=True)
class Task:
    """A prompt, and the answer that is dictated."""

    name: str
    prompt: list[int]
    answer: list[int]


def tasks(file: Path, num_tokens: int) -> list[Task]:
    """The two answers. prose is a page of the documentation behind another one."""
    encode = vocabulary().encode
    source = "\n".join(file.read_text().splitlines()[:300])
    name = max(set(filter(str.isidentifier, source.split())), key=lambda word: source.count(word) * len(word))
    edited = source.replace(name, name + "_new")
    prose = (ROOT / "docs" / "architecture.md").read_text()
    return [
        Task("copy", encode(f"{source}\n\nRename {name} to {name}_new.\n\n"), encode(edited)[:num_tokens]),
        Task("prose", encode((ROOT / "README.md").read_text()[:2000]), encode(prose)[:num_tokens]),
    ]


async def timed(engine: LocalEngine, dictation: Dictation, task: Task) -> float:
    """Tokens per second from the first token on."""
    dictation.text = task.prompt + task.answer
    params = SamplingParams(temperature=0, max_tokens=len(task.answer))
    start, num_tokens = 0.0, 0
    async for event in engine.generate(Request("r", tuple(task.prompt), params)):
        if not start:
            start = time.perf_counter()
            continue
        num_tokens += len(event.tokens)
    return num_tokens / (time.perf_counter() - start)


async def measure(model: str, given: list[Task], rounds: int) -> None:
    longest = max(len(task.prompt) + len(task.answer) for task in given) + 1
    engine = create_engine(model, EngineConfig(context_length=longest, max_sequences=1))
    await engine.wait_until_resident()
    worker = engine._worker
    dictation = Dictation(worker._runner)
    worker._runner = dictation
    scheduler = worker._scheduler
    guessing = scheduler._drafter
    speeds: dict[tuple[str, str], list[float]] = {}
    drafted: dict[str, list[EngineStatistics]] = {}
    for task in given:
        await timed(engine, dictation, Task(task.name, task.prompt, task.answer[:8]))
        for _ in range(rounds):
            for mode, drafter in (("off", None), ("ngram", guessing)):
                scheduler._drafter = drafter
                before = engine.statistics
                speeds.setdefault((task.name, mode), []).append(await timed(engine, dictation, task))
                if drafter is not None:
                    drafted[task.name] = [before, engine.statistics]
    await engine.close()
    print(f"{'answer':8} {'off tok/s':>10} {'ngram tok/s':>12} {'ratio':>6}   guessed, true, steps")
    for task in given:
        off, ngram = speeds[task.name, "off"], speeds[task.name, "ngram"]
        ratio = statistics.median(b / a for a, b in zip(off, ngram, strict=True))
        before, after = drafted[task.name]
        print(
            f"{task.name:8} {statistics.median(off):10.2f} {statistics.median(ngram):12.2f} {ratio:6.2f}   "
            f"{after.num_draft_tokens - before.num_draft_tokens}, "
            f"{after.num_accepted_draft_tokens - before.num_accepted_draft_tokens}, "
            f"{after.num_steps - before.num_steps}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="off and ngram in turn (default 3)")
    parser.add_argument(
        "--file", type=Path, default=ROOT / "harmonium/harmony/parse.py", help="what is copied"
    )
    options = parser.parse_args()
    asyncio.run(measure(options.model, tasks(options.file, options.tokens), options.rounds))


if __name__ == "__main__":
    main()
