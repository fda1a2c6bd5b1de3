"""Greedy answers of Transformers and ours (docs/demo.md): `python -m demo.compare [MODEL] --prompts 100`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from demo.score import MAX_TOKENS
from harmonium import LLM, SamplingParams
from harmonium.config import Weights
from harmonium.demo import demo_checkpoint_path
from harmonium.demo_items import DemoItem, demo_items
from harmonium.harmony.render import render_prompt
from harmonium.llm_input import chat_request

DATE = "2026-11-25"


def prompt_of(item: DemoItem) -> list[int]:
    request = chat_request(
        item.messages,
        item.tools,
        item.effort,
        None,
        None,
        DATE,
        None,
        response_format=item.response_format,
    )
    return render_prompt(request.conversation)


def load(path: Path) -> Any:
    """In float32; a missing or unexpected tensor ends the comparison."""
    model, report = transformers.GptOssForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        output_loading_info=True,
    )
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"Transformers does not load it strictly: {wrong}")
    return model.float().eval()


@torch.no_grad()
def likeliest(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """What Transformers writes at each place of the answer: the same where its greedy answer is the same."""
    logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    found: list[int] = logits.argmax(-1).tolist()
    return found


def compared(path: Path, num_prompts: int, weights: Weights) -> tuple[list[str], list[str]]:
    """Ids of the items, spread over the skills, on which both write the same, and on which they do not."""
    items = demo_items()
    chosen = [items[index * len(items) // num_prompts] for index in range(num_prompts)]
    prompts = [prompt_of(item) for item in chosen]
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    with LLM(path, weights=weights, context_length=2048) as llm:
        answers = [[token.token_id for token in answer.tokens] for answer in llm.generate(prompts, sampling)]
    model = load(path)
    same: list[str] = []
    different: list[str] = []
    for item, prompt, answer in zip(chosen, prompts, answers, strict=True):
        (same if likeliest(model, prompt, answer) == answer else different).append(item.id)
    return same, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--weights", choices=("int8", "bf16"), default="int8")
    arguments = parser.parse_args()
    path = arguments.model or demo_checkpoint_path()
    same, different = compared(path, arguments.prompts, arguments.weights)
    print(
        f"the same greedy answer on {len(same)} of {len(same) + len(different)} prompts; not on {different}"
    )


if __name__ == "__main__":
    main()
