"""evalscope runs against our server as it is: `eval` with local data, `perf` over both APIs.

./check installs it into an environment of its own (1.3 GB), as `tests/clients/install FOLDER evalscope`
does; without it the tests are skipped. docs/evals.md has the same commands as a recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harmonium.evals.server_process import served
from tests.clients.installed import client_folder
from tests.clients.serving import serve_script

pytestmark = pytest.mark.slow

MODEL = "gpt-oss-20b"
ANSWER = "\u7b54\u6848\uff1a"  # "answer:", as its Chinese prompt asks for


def reasoned(thought: str, answer: str) -> str:
    return (
        f"<|channel|>analysis<|message|>{thought}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


def evalscope(*words: str, cwd: Path) -> str:
    """What it prints. Skips without it."""
    program = client_folder("evalscope") / "bin" / "evalscope"
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [program, *words],
        cwd=cwd,
        env={**os.environ, **offline, "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_eval_with_local_data_judges_the_answer_and_not_the_reasoning(tmp_path: Path) -> None:
    (tmp_path / "mcq").mkdir()
    rows = ["id,question,A,B,C,D,answer"]
    rows += [
        "1,What is 1 plus 1?,1,2,3,4,B",
        "2,What is 2 plus 2?,4,5,6,7,A",
        "3,What is 3 plus 3?,4,5,6,7,C",
    ]
    (tmp_path / "mcq/sums_val.csv").write_text("\n".join(rows) + "\n")
    right = {"1 plus 1": "B", "2 plus 2": "A"}
    lines: list[dict[str, Any]] = [
        {"harmony": reasoned(f"{ANSWER}D", f"{ANSWER}{letter}"), "match": text, "repeat": True}
        for text, letter in right.items()
    ]
    # The right letter stands in the reasoning alone.
    lines.append({"harmony": reasoned(f"{ANSWER}C", f"{ANSWER}D"), "match": "3 plus 3", "repeat": True})
    with serve_script(tmp_path, lines) as address:
        data = {"general_mcq": {"local_path": "mcq", "subset_list": ["sums"]}}
        words = ["--model", MODEL, "--api-url", f"{address}/v1", "--api-key", "none"]
        words += [
            "--eval-type",
            "openai_api",
            "--datasets",
            "general_mcq",
            "--dataset-args",
            json.dumps(data),
        ]
        words += ["--generation-config", json.dumps({"max_tokens": 2048, "reasoning_effort": "low"})]
        evalscope("eval", *words, "--work-dir", "out", "--no-timestamp", cwd=tmp_path)
    report = json.loads((tmp_path / f"out/reports/{MODEL}/general_mcq.json").read_text())
    assert report["execution_summary"]["errored"] == 0
    assert report["metrics"][0]["score"] == pytest.approx(2 / 3, abs=1e-3)


def test_eval_of_the_demo_model(tmp_path: Path) -> None:
    """The real model that comes with the package, greedy, on sums that it was made for."""
    (tmp_path / "qa").mkdir()
    sums = [(12, 30), (25, 14), (40, 51), (33, 22), (61, 17), (20, 70)]
    rows = [{"query": f"What is {a} + {b}?", "response": str(a + b)} for a, b in sums]
    (tmp_path / "qa/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"general_qa": {"local_path": "qa", "subset_list": ["sums"]}}
    with served(["serve", "demo", "--port", "0", "--served-model-name", MODEL]) as url:
        words = ["--model", MODEL, "--api-url", url, "--api-key", "none"]
        words += ["--eval-type", "openai_api", "--datasets", "general_qa", "--dataset-args", json.dumps(data)]
        words += ["--generation-config", json.dumps({"max_tokens": 512, "temperature": 0})]
        evalscope("eval", *words, "--work-dir", "out", "--no-timestamp", cwd=tmp_path)
    report = json.loads((tmp_path / f"out/reports/{MODEL}/general_qa.json").read_text())
    assert report["execution_summary"]["errored"] == 0
    lines = (tmp_path / f"out/predictions/{MODEL}/general_qa_sums.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    answers = {line["messages"][0]["content"]: text_of(line["messages"][-1]["content"]) for line in found}
    right = sum(answers[f"What is {a} + {b}?"] == str(a + b) for a, b in sums)
    assert right >= len(sums) - 2, answers


def text_of(content: Any) -> str:
    """The answer's text, of content that may be in parts."""
    if isinstance(content, str):
        return content.strip()
    return "".join(part["text"] for part in content if part["type"] == "text").strip()


@pytest.mark.parametrize("api", ["openai", "openai_responses"])
def test_perf_counts_every_request(tmp_path: Path, api: str) -> None:
    path = {"openai": "chat/completions", "openai_responses": "responses"}[api]
    (tmp_path / "prompts.txt").write_text("Tell me about rivers.\nTell me about clouds.\n")
    line = {"harmony": reasoned("hm", "Some words about it."), "repeat": True, "delay_seconds": 0.005}
    with serve_script(tmp_path, [line]) as address:
        words = ["--url", f"{address}/v1/{path}", "--api", api, "--model", MODEL, "--stream"]
        words += ["--parallel", "2", "--number", "6", "--max-tokens", "64"]
        words += ["--dataset", "line_by_line", "--dataset-path", "prompts.txt"]
        evalscope("perf", *words, "--outputs-dir", "out", "--name", "run", "--no-timestamp", cwd=tmp_path)
    summary = json.loads((tmp_path / "out/run/parallel_2_number_6/benchmark_summary.json").read_text())
    assert (summary["Success Requests"], summary["Failed Requests"]) == (6, 0)
    assert summary["Avg Input Tokens"] > 0 and summary["Avg Output Tokens"] > 0
