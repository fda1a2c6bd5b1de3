"""`harmonium eval`: from the options to the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from harmonium import __version__
from harmonium.config import environment_api_keys
from harmonium.errors import ConfigError
from harmonium.evals.client import Address, ChatClient
from harmonium.evals.item import EFFORTS, Effort
from harmonium.evals.progress import progress
from harmonium.evals.report import Report, make_report, print_report, write_report
from harmonium.evals.run import AskSettings, Question, answer, choose_items, questions, run_questions
from harmonium.evals.samples import SampleFile, check_settings
from harmonium.evals.server_process import serve_words, served
from harmonium.evals.task import LoadedTask, Task
from harmonium.evals.tasks import TASKS, find_task

LOADING_SECONDS = 300.0
"""Longest wait for a server that lists no model yet."""


def run_eval(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, or 1 when some items ended in an error.

    Raises ConfigError for what cannot be run as asked; EngineError when the server does not start or is gone.
    """
    if arguments.list:
        print_tasks()
        return 0
    if arguments.task is None:
        raise ConfigError(f"which task? There are {', '.join(TASKS)} (harmonium eval --list says more)")
    task = find_task(arguments.task)
    if arguments.model is not None and arguments.base_url is not None:
        raise ConfigError("both --model and --base-url are given; expected one")
    task.prepare()
    loaded = task.load(arguments.data, arguments.seed)
    efforts = cast("tuple[Effort, ...]", arguments.effort or tuple(task.efforts))
    max_tokens = {e: arguments.max_tokens or task.max_tokens[e] for e in efforts}
    with _server(arguments, max_tokens) as client:
        report, folder = _run(arguments, task, loaded, max_tokens, client)
    if arguments.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        print_report(report, sys.stdout)
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    errors = sum(sample.result == "error" for sample in report.samples)
    if errors:
        first = next(sample for sample in report.samples if sample.result == "error")
        print(
            f"harmonium: {errors:,} samples ended in an error and were not judged; --resume asks them again. "
            f"The first, {first.id}: {first.error}",
            file=sys.stderr,
        )
    return 1 if errors else 0


def print_tasks() -> None:
    """The tasks, what they are and which files --data takes."""
    for task in TASKS.values():
        print(f"{task.name:10} {task.about}")
        print(f"{'':10} files: {task.files}")


@contextmanager
def _server(arguments: argparse.Namespace, max_tokens: Mapping[Effort, int]) -> Iterator[ChatClient]:
    """A client of the server that is given, or of one that runs for as long."""
    key = arguments.api_key or next(iter(environment_api_keys()), None)
    if arguments.base_url is not None:
        yield ChatClient(Address.parse(arguments.base_url), key, arguments.timeout)
        return
    words = serve_words(arguments.model, arguments, arguments.concurrency, max(max_tokens.values()))
    print("starting the server ...", file=sys.stderr, flush=True)
    with served(words) as url:
        yield ChatClient(Address.parse(url), key, arguments.timeout)


def _run(
    arguments: argparse.Namespace,
    task: Task,
    loaded: LoadedTask,
    max_tokens: dict[Effort, int],
    client: ChatClient,
) -> tuple[Report, Path]:
    """Ask what is not answered yet and write the report."""
    model = _model_name(client, arguments.model_name)
    temperature = task.temperature if arguments.temperature is None else arguments.temperature
    asking = AskSettings(model, max_tokens, temperature, arguments.seed)
    settings = _settings(arguments, task, loaded, asking)
    folder = arguments.out if arguments.out is not None else Path("evals") / task.name
    check_settings(folder, settings, arguments.resume)
    efforts = [effort for effort in EFFORTS if effort in max_tokens]
    items = choose_items(loaded.items, arguments.limit, arguments.seed)
    asked = questions(items, efforts, arguments.samples)
    if not asked:
        raise ConfigError(f"{task.name} has no item for --effort {','.join(efforts)}")
    keys = [question.key for question in asked]
    with SampleFile(folder) as file:
        try:
            _ask(arguments, task, asking, asked, client, file)
        finally:  # what is there is worth a report, after Ctrl-C too
            samples = file.only(keys)
            report = make_report(task.name, task.title, task.group_name, settings, len(keys), samples)
            write_report(report, folder)
    return report, folder


def _ask(
    arguments: argparse.Namespace,
    task: Task,
    asking: AskSettings,
    asked: list[Question],
    client: ChatClient,
    file: SampleFile,
) -> None:
    answered = file.answered()
    left = [question for question in asked if question.key not in answered]
    before = file.only(question.key for question in asked if question.key in answered)
    with progress(len(asked), before, sys.stderr) as show:
        run_questions(
            left,
            lambda question: answer(client, task, asking, question),
            file,
            arguments.concurrency,
            show,
            client.stop,
        )


def _model_name(client: ChatClient, wanted: str | None) -> str:
    """The name to ask for. Raises ConfigError when the server lacks it, or has several and none is named."""
    end = time.monotonic() + LOADING_SECONDS
    while not (names := client.model_names()) and time.monotonic() < end:
        time.sleep(0.2)  # ours listens before it has loaded, and lists nothing until then
    if wanted is None and len(names) == 1:
        return names[0]
    listed = ", ".join(names) or "none"
    if wanted is None:
        raise ConfigError(f"which model? {client.address} has {listed}: --model-name NAME")
    if wanted not in names:
        raise ConfigError(f"{client.address} has no model {wanted!r}; it has {listed}")
    return wanted


def _settings(
    arguments: argparse.Namespace, task: Task, loaded: LoadedTask, asking: AskSettings
) -> dict[str, Any]:
    """What decides the result. A run goes on only with the same; how it is asked (address, concurrency) may
    change.
    """
    return {
        "task": task.name,
        "model": asking.model,
        "efforts": list(asking.max_tokens),
        "limit": arguments.limit,
        "samples": arguments.samples,
        "seed": asking.seed,
        "max_tokens": dict(asking.max_tokens),
        "temperature": asking.temperature,
        "data_sha256": loaded.digest,
        "version": __version__,
    }
