"""The command `harmonium`: parse, build configs, call one function.

A user's mistake (an option, a path, a value) costs one line on stderr and exit code 2; our other errors one
line and the exit code of their class; Ctrl-C ends with 130 and a closed pipe with 141, both without a word.
Modules that load NumPy, native code or asyncio are imported by the commands that need them, so that `--help`
answers at once and Ctrl-C finds `main` already there to meet it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from harmonium.errors import ConfigError, HarmoniumError
from harmonium.options import DEFAULT_EFFORT, engine_config, lora_source, parse

if TYPE_CHECKING:
    from harmonium.chat_session import ChatSession
    from harmonium.engine.protocol import Engine
    from harmonium.model.batch import SamplingParams

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

EFFORTS = ("low", "medium", "high")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; nothing that a user can do wrong leaves a traceback.

    argv: the words after `harmonium`; None: those of this process.
    """
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Bytes that are no text are read as U+FFFD; a terminal that lacks a character shows "?" for it.
            stream.reconfigure(errors="replace")
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()  # here, where a closed pipe can still be met in peace
    except HarmoniumError as error:
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except (OSError, MemoryError) as error:
        return complain(_describe(error), 1)
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
    except SystemExit as request:  # argparse, after --help and --version
        return request.code if isinstance(request.code, int) else 0
    return COMMANDS[arguments.command](arguments)


def _open_closed_streams() -> None:
    """Put the null device where a stream was closed before the start (`>&-`): Python leaves None there.

    It also takes the stream's number, so that no file opened later is written to in its place.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good


def complain(message: str, code: int) -> int:
    """Write one line on stderr, whatever the message holds, and return the code."""
    try:
        print(f"harmonium: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except OSError:  # nobody is there to be told
        _discard(sys.stderr)
    return code


def _describe(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory (harmonium inspect shows what a model needs; --context-length takes less)"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _discard(stream: TextIO) -> None:
    """Point the stream at the null device, so that the interpreter's flush at exit meets no closed pipe."""
    # A stream without a file descriptor has no pipe either.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_inspect(arguments: argparse.Namespace) -> int:
    """`harmonium inspect`."""
    from harmonium.inspect_report import inspect
    from harmonium.loading import model_to_inspect

    with model_to_inspect(arguments.model) as (path, origin):
        report = inspect(path, engine_config(arguments), origin, arguments.model)
    if arguments.json:
        _print_json(report.to_json())
    else:
        print(report.text(), end="")
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    """`harmonium generate`."""
    from harmonium.continuation import checked_prompt, generate, logprob_table, read_prompt

    sampling, adapter = _sampling(arguments, logprobs=arguments.logprobs), _adapter(arguments)
    name, token_ids = read_prompt(arguments.prompt, arguments.tokens)
    engine = _engine(arguments)

    async def run() -> None:
        prompt = checked_prompt(name, token_ids, engine.info.vocabulary_size)
        result = await generate(engine, prompt, sampling, None if arguments.json else sys.stdout, adapter)
        if arguments.json:
            _print_json({"model": adapter or engine.info.model_name, **result.to_json()})
            return
        print()
        if arguments.logprobs is not None:
            print(logprob_table(result), end="")

    _run_and_close(engine, run())
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """`harmonium chat`, with a question or without."""
    from harmonium.chat_session import ChatSession

    if arguments.json and arguments.question is None:
        raise ConfigError('--json needs a question, such as: harmonium chat MODEL "question" --json')
    session = ChatSession(
        sampling=_sampling(arguments),
        current_date=datetime.date.today().isoformat(),
        instructions=arguments.system,
        effort=arguments.effort or DEFAULT_EFFORT,
        uses_grammar=not arguments.no_grammar,
        adapter=_adapter(arguments),
    )
    if arguments.load is not None:
        session.load(arguments.load, instructions=arguments.system, effort=arguments.effort)
    if arguments.question is None:
        return _converse(arguments, session)
    return _ask(arguments, session)


def _converse(arguments: argparse.Namespace, session: ChatSession) -> int:
    from harmonium.interactive import Interactive
    from harmonium.screen import Screen

    session.shows_reasoning = bool(arguments.show_reasoning)
    Interactive(_engine(arguments), session, Screen(sys.stdout)).run()
    return 0


def _ask(arguments: argparse.Namespace, session: ChatSession) -> int:
    from harmonium.question import ask, note, result_json
    from harmonium.screen import Screen
    from harmonium.text_file import read_text

    question = read_text("-") if arguments.question == "-" else arguments.question
    if not question.strip():
        raise ConfigError("the question is empty")
    shows_reasoning = arguments.show_reasoning
    if shows_reasoning is None:
        shows_reasoning = sys.stderr.isatty() and not arguments.json
    engine = _engine(arguments)

    async def run() -> None:
        result = await ask(
            engine,
            session.request(question),
            content=None if arguments.json else Screen(sys.stdout),
            reasoning=Screen(sys.stderr) if shows_reasoning else None,
        )
        if arguments.json:
            _print_json(result_json(result, session.adapter or engine.info.model_name))
        elif (remark := note(result)) is not None:
            complain(remark, 0)

    _run_and_close(engine, run())
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """`harmonium bench`."""
    from harmonium.bench import BenchOptions, run_bench
    from harmonium.bench_report import print_report
    from harmonium.loading import find_model

    options = BenchOptions(
        model=find_model(arguments.model),
        config=engine_config(arguments),
        prefill=arguments.prefill,
        decode=arguments.decode,
        depth=arguments.depth,
        batch=arguments.batch,
    )
    report = run_bench(options, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        _print_json(report.to_json())
    else:
        print_report(report, sys.stdout)
    return 0


def run_serve(arguments: argparse.Namespace) -> int:
    """`harmonium serve`."""
    if arguments.replicas is not None:
        from harmonium.ray import serve_replicas

        return serve_replicas(arguments)
    if arguments.ray_address is not None:
        raise ConfigError("--ray-address says where --replicas run; give both")
    from harmonium.server.serve import serve

    arguments.max_sequences = arguments.max_concurrency
    return serve(arguments, engine_config(arguments))


def run_eval(arguments: argparse.Namespace) -> int:
    """`harmonium eval`."""
    from harmonium.evals.command import run_eval

    return run_eval(arguments)


def run_pull(arguments: argparse.Namespace) -> int:
    """`harmonium pull`."""
    from harmonium.loading import pull_model

    print(pull_model(arguments))
    return 0


def run_finetune(arguments: argparse.Namespace) -> int:
    """`harmonium finetune`."""
    from harmonium.finetune.command import run_finetune

    return run_finetune(arguments)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "inspect": run_inspect,
    "generate": run_generate,
    "chat": run_chat,
    "bench": run_bench,
    "serve": run_serve,
    "eval": run_eval,
    "pull": run_pull,
    "finetune": run_finetune,
}


def _sampling(arguments: argparse.Namespace, logprobs: int | None = None) -> SamplingParams:
    from harmonium.model.batch import SamplingParams

    return SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        logprobs=logprobs,
    )


def _adapter(arguments: argparse.Namespace) -> str | None:
    """The name of the one adapter that a command uses."""
    if len(arguments.lora) > 1:
        raise ConfigError(
            f"--lora is given {len(arguments.lora)} times; {arguments.command} uses one adapter"
        )
    return lora_source(arguments.lora[0]).name if arguments.lora else None


def _engine(arguments: argparse.Namespace) -> Engine:
    config = engine_config(arguments)
    from harmonium.loading import find_model, load_engine

    return load_engine(find_model(arguments.model), config)


_Result = TypeVar("_Result")


def _run_and_close(engine: Engine, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run the work in an event loop of its own; the engine is closed in that loop whatever happens."""
    import asyncio

    async def run() -> _Result:
        try:
            return await work
        finally:
            await engine.close()

    return asyncio.run(run())


def _print_json(record: Mapping[str, object]) -> None:
    print(json.dumps(record, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    sys.exit(main())
