"""Each task reads its files as they were published, asks plainly and judges the answer."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from harmonium.demo_items import demo_items
from harmonium.errors import ConfigError
from harmonium.evals import humaneval
from harmonium.evals.humaneval import HumanEval, program
from harmonium.evals.ifeval import IfEval
from harmonium.evals.item import EFFORTS, Item, Reply
from harmonium.evals.run import choose_items, judge_reply, questions
from harmonium.evals.sandbox import Outcome, check_sandbox
from harmonium.evals.tasks import TASKS


def load(task: str, folder: Path, seed: int = 0) -> tuple[Item, ...]:
    return TASKS[task].load(folder, seed).items


def text_of(item: Item) -> str:
    (message,) = item.messages
    assert message["role"] == "user"
    return str(message["content"])


def judge(task: str, item: Item, content: str) -> bool:
    return judge_reply(TASKS[task], item, Reply(content)).is_right


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


GPQA_HEAD = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]


def test_mmlu_reads_the_authors_files(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    write_csv(tmp_path / "test/world_history_test.csv", [["Who,\nthen?", "a", "b", "c", "d", "C"]] * 2)
    write_csv(tmp_path / "test/anatomy_test.csv", [["Where?", "a", "b", "c", "d", "A"]])
    items = load("mmlu", tmp_path)
    assert [(item.group, item.expected) for item in items] == [
        ("anatomy", "A"),
        ("world history", "C"),
        ("world history", "C"),
    ]
    assert len({item.id for item in items}) == 3
    assert "Who,\nthen?\n\nA) a\nB) b\nC) c\nD) d\n" in text_of(items[1])
    assert judge("mmlu", items[0], "Answer: A") and not judge("mmlu", items[0], "Answer: B")


def test_mmlu_reads_rows_as_on_the_hub(tmp_path: Path) -> None:
    row = {"question": "Which?", "subject": "high_school_physics", "choices": list("wxyz"), "answer": 3}
    write_jsonl(tmp_path / "mmlu.jsonl", [row, {**row, "answer": "B"}])
    items = load("mmlu", tmp_path)
    assert [(item.group, item.expected) for item in items] == [
        ("high school physics", "D"),
        ("high school physics", "B"),
    ]


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"question": "Which?", "subject": "law", "choices": list("wxyz"), "answer": 1}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test-00000-of-00001.parquet")
    assert load("mmlu", tmp_path)[0].expected == "B"


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"needs pyarrow .*harmonium\[eval\]"):
        load("mmlu", tmp_path)


def test_gpqa_shuffles_the_right_option_away_from_the_first_place(tmp_path: Path) -> None:
    rows = [[f"Question {n}?", f"right {n}", f"w1 {n}", f"w2 {n}", f"w3 {n}"] for n in range(40)]
    write_csv(tmp_path / "gpqa_diamond.csv", [GPQA_HEAD, *rows])
    items = load("gpqa", tmp_path, seed=1)
    for number, item in enumerate(items):
        assert f"{item.expected}) right {number}" in text_of(item)
    counts = [sum(item.expected == letter for item in items) for letter in "ABCD"]
    assert min(counts) > 2
    assert load("gpqa", tmp_path, seed=1) == items
    assert load("gpqa", tmp_path, seed=2) != items


@pytest.mark.parametrize(
    ("task", "name", "row"),
    [
        ("aime24", "aime24.jsonl", {"problem": "Find m+n.", "answer": "033"}),
        ("aime24", "aime2024.jsonl", {"ID": "2024-I-1", "Problem": "Find m+n.", "Answer": 33}),
        ("aime25", "aime2025-I.jsonl", {"question": "Find m+n.", "answer": "33^\\circ"}),
    ],
)
def test_aime_answer_is_a_whole_number(tmp_path: Path, task: str, name: str, row: dict[str, Any]) -> None:
    write_jsonl(tmp_path / name, [row])
    (item,) = load(task, tmp_path)
    assert item.expected == 33 and "\\boxed{}" in text_of(item)
    assert judge(task, item, r"\boxed{33}") and judge(task, item, r"\boxed{033}")
    assert not judge(task, item, r"\boxed{34}") and not judge(task, item, "I do not know")
    assert TASKS[task].max_tokens["high"] >= 64_000


def test_gsm8k_answers_are_numbers(tmp_path: Path) -> None:
    rows = [
        {"question": "How much?", "answer": "so <<1=1>>\n#### 1,234"},
        {"question": "Loss?", "answer": "#### -2.5"},
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    first, second = load("gsm8k", tmp_path)
    assert judge("gsm8k", first, r"\boxed{\$1{,}234.00}") and not judge("gsm8k", first, r"\boxed{123}")
    assert judge("gsm8k", second, "The answer is -2.5.")


@pytest.mark.parametrize(
    ("task", "name", "content", "why"),
    [
        ("gsm8k", "test.jsonl", "", "no rows"),
        ("gsm8k", "test.jsonl", "{nonsense", "cannot be read as jsonl"),
        ("gsm8k", "test.jsonl", "[1]", "expected an object with question"),
        ("gsm8k", "test.jsonl", '{"question": "x"}', "lacks answer; it has question"),
        ("gsm8k", "test.jsonl", '{"question": "x", "answer": "5"}', "does not end with ####"),
        ("gsm8k", "other.jsonl", "", r"holds none of gsm8k\*.jsonl"),
        ("aime25", "aime25.jsonl", '{"question": "x", "answer": "none"}', "a whole answer"),
        ("mmlu", "x_test.csv", "only,two", "expected question, four options"),
        ("mmlu", "mmlu.jsonl", '{"question": "x", "choices": [1], "answer": 0}', "four choices"),
        ("gpqa", "gpqa_diamond.csv", "Question\nx\n", "lacks Correct Answer"),
        ("humaneval", "HumanEval.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_file_that_is_wrong_is_named(tmp_path: Path, task: str, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load(task, tmp_path)
    assert name in str(caught.value) or name == "other.jsonl" or "row" in str(caught.value)


def test_hub_is_asked_for_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "aime2025-I.jsonl", [{"question": "1?", "answer": "1"}])
    write_jsonl(tmp_path / "aime2025-II.jsonl", [{"question": "2?", "answer": "2"}])
    asked = []

    def download(repo: str, name: str, *, repo_type: str) -> str:
        asked.append((repo, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    items = TASKS["aime25"].load(None, 0).items
    assert [item.expected for item in items] == [1, 2]
    assert asked[0] == ("opencompass/AIME2025", "aime2025-I.jsonl", "dataset")


def test_hub_that_fails_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("offline\nand a long explanation")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    with pytest.raises(ConfigError, match="openai/gsm8k cannot be had from the hub: offline") as caught:
        TASKS["gsm8k"].load(None, 0)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"harmonium\[eval\].*--data FOLDER"):
        TASKS["gsm8k"].load(None, 0)


PROMPT = '''from typing import List


def helper(x: int) -> int:
    return x + 1


def total(xs: List[int]) -> int:
    """Sum."""
'''
WHOLE = "def total(xs: List[int]) -> int:\n    return sum(xs)"


def test_humaneval_files_are_read_packed_and_plain(tmp_path: Path) -> None:
    row = {
        "task_id": "T/0",
        "prompt": PROMPT,
        "test": "def check(f):\n    assert f([1, 2]) == 3\n",
        "entry_point": "total",
    }
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (packed,) = load("humaneval", tmp_path)
    write_jsonl(tmp_path / "HumanEval.jsonl", [row])
    assert load("humaneval", tmp_path) == (packed,)
    assert PROMPT.strip() in text_of(packed)


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{WHOLE}\n```",
        f"Like this:\n```py\nprint('no')\n```\nor better\n\n```\n{WHOLE}\n```\nDone.",
        f"```python\n{WHOLE}",
        f"```Python\r\n{WHOLE}\r\n```",
        WHOLE,
        "```python\n    return sum(xs)\n```",
        "```python\ndef total(xs):\n    return helper(sum(xs) - 1)\n```",
    ],
)
def test_code_is_found_in_the_answer(answer: str) -> None:
    code = program(answer, PROMPT, "total")
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code, "answer", "exec"), names)
    assert names["total"]([1, 2]) == 3


@pytest.mark.parametrize(
    "answer", ["", "I cannot.", "```python\nprint(1)\n```", "```python\ndef totals(): pass\n```"]
)
def test_answer_without_the_function_has_no_code(answer: str) -> None:
    assert program(answer, PROMPT, "total") is None


def test_humaneval_runs_the_tests_of_the_problem(tmp_path: Path) -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))
    row = {
        "task_id": "T/0",
        "prompt": PROMPT,
        "test": "def check(f):\n    assert f([1, 2]) == 3\n",
        "entry_point": "total",
    }
    write_jsonl(tmp_path / "HumanEval.jsonl", [row])
    (item,) = load("humaneval", tmp_path)
    assert judge("humaneval", item, f"```python\n{WHOLE}\n```")
    verdict = TASKS["humaneval"].judge(item, Reply("```python\ndef total(xs):\n    return 4\n```"))
    assert (verdict.is_right, verdict.note) == (False, "AssertionError: ")
    assert not judge("humaneval", item, "```python\nimport sys\ndef total(xs): sys.exit(0)\n```")


def test_humaneval_is_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmonium.evals.sandbox.run_confined", lambda *_: Outcome(False, "no seccomp"))
    monkeypatch.setattr(humaneval, "run_confined", lambda *_: pytest.fail("code was run"))
    with pytest.raises(ConfigError, match="runs code that the model wrote"):
        HumanEval().prepare()


def ifeval_row(**fields: Any) -> dict[str, Any]:
    return {
        "key": 1000,
        "prompt": "Write a poem. Use no commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
        **fields,
    }


def test_ifeval_calls_lm_evals_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for lm-eval: which arguments its function gets and what becomes of its verdict."""
    seen: list[tuple[Any, str]] = []

    def check(example: Any, response: str) -> Any:
        seen.append((example, response))
        return SimpleNamespace(follow_instruction_list=["," not in response])

    checks = ModuleType("lm_eval.tasks.ifeval.utils")
    checks.InputExample = lambda *fields: fields  # type: ignore[attr-defined]
    checks.test_instruction_following_strict = check  # type: ignore[attr-defined]
    nltk = SimpleNamespace(data=SimpleNamespace(find=lambda name: name))
    for name, module in {"lm_eval.tasks.ifeval.utils": checks, "nltk": nltk}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    write_jsonl(tmp_path / "input_data.jsonl", [ifeval_row()])
    task = IfEval()
    task.prepare()
    (item,) = task.load(tmp_path, 0).items
    assert task.judge(item, Reply("no comma")).is_right
    verdict = task.judge(item, Reply("one, two"))
    assert (verdict.is_right, verdict.note) == (False, "not followed: punctuation:no_comma")
    assert seen[0] == ((1000, ["punctuation:no_comma"], item.details["prompt"], [{}]), "no comma")


def test_ifeval_without_lm_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'harmonium\[ifeval\]'"):
        IfEval().prepare()


def test_ifeval_with_the_real_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # these checks split no sentences
    rows = [
        ifeval_row(),
        ifeval_row(key=1, instruction_id_list=["keywords:existence"], kwargs=[{"keywords": ["river"]}]),
        ifeval_row(
            key=2,
            instruction_id_list=["change_case:english_lowercase", "punctuation:no_comma"],
            kwargs=[{}, {}],
        ),
    ]
    write_jsonl(tmp_path / "ifeval_input_data.jsonl", rows)
    task = IfEval()
    task.prepare()
    items = task.load(tmp_path, 0).items
    answers = [("A poem.", "A poem, short."), ("the river", "the lake"), ("all is small here", "All, is not")]
    for item, (good, bad) in zip(items, answers, strict=True):
        assert task.judge(item, Reply(good)).is_right and not task.judge(item, Reply(bad)).is_right


def test_demo_items_are_right_when_answered_as_expected() -> None:
    task = TASKS["demo"]
    items = task.load(None, 0).items
    assert len(items) == len(demo_items()) > 100
    for item in items:
        if item.details["item"].judge == "call":
            call = (item.expected["name"], json.dumps(item.expected["arguments"]))
            good, bad = Reply("", tool_calls=(call,)), Reply("", tool_calls=(call, call))
        else:
            text = item.expected if isinstance(item.expected, str) else json.dumps(item.expected)
            good, bad = Reply(f" {text}\n", reasoning="x"), Reply("no", reasoning=text)
        assert judge_reply(task, item, good).is_right, item.id
        assert not judge_reply(task, item, bad).is_right, item.id


def test_demo_items_are_asked_at_their_own_effort() -> None:
    items = TASKS["demo"].load(None, 0).items
    asked = questions(items, EFFORTS, 1)
    assert len(asked) == len(items)
    assert all(question.item.effort == question.effort for question in asked)
    assert len({item.group for item in items}) > 3


def test_limit_draws_over_the_whole_set_and_keeps_the_order() -> None:
    items = [Item(f"{n:03d}", "", (), 0) for n in range(1000)]
    chosen = choose_items(items, 50, seed=3)
    ids = [item.id for item in chosen]
    assert ids == sorted(ids) and len(set(ids)) == 50
    assert int(ids[0]) < 200 and int(ids[-1]) > 800
    assert choose_items(items, 50, seed=3) == chosen != choose_items(items, 50, seed=4)
    assert choose_items(items, None, 3) == choose_items(items, 2000, 3) == items


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_allows_long_reasoning_at_high_effort(task: str) -> None:
    limits = TASKS[task].max_tokens
    assert set(limits) == set(EFFORTS)
    assert limits["low"] <= limits["medium"] <= limits["high"]
    assert task == "demo" or limits["high"] >= 64_000


def test_judge_is_not_asked_about_cut_or_empty_answers() -> None:
    task = TASKS["gsm8k"]
    item = Item("x", "", (), "5")
    ask: Callable[[Reply], bool] = lambda reply: judge_reply(task, item, reply).is_right  # noqa: E731
    assert ask(Reply(r"\boxed{5}"))
    assert not ask(Reply(r"\boxed{5}", finish_reason="length"))
    assert not ask(Reply("  ", reasoning=r"\boxed{5}"))
