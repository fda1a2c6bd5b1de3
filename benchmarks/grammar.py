"""Do documents written under the grammar validate, and what does a mask cost? One row of figures.

    python -m benchmarks.grammar schemas.json --documents 3

The file is a JSON list of objects with a "schema" each, such as a sample of guidance-ai/jsonschemabench.
Tokens are drawn from the masks alone, so this needs no model. Times are CPU time; a
mask's is that of `TurnState.mask`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from harmonium.errors import RequestError
from harmonium.harmony.grammar import CompiledTurn, TurnRules, compile_turn
from harmonium.harmony.grammar_compile import tokenizer
from harmonium.harmony.grammar_state import Mask, TurnState
from harmonium.harmony.grammar_text import json_schema_format
from harmonium.harmony.parse import parse
from tests.harmony.random_turns import walk


class _TimedState(TurnState):
    """Notes what each mask took, in seconds."""

    seconds: list[float] = []  # noqa: RUF012 - one list for the run, on purpose

    def mask(self) -> Mask:
        start = time.process_time()
        mask = super().mask()
        self.seconds.append(time.process_time() - start)
        return mask


def check(schema: Any, turn: CompiledTurn, rng: random.Random) -> str:
    """Write one document; "valid", "invalid" or "unfinished" (the draw did not come to an end)."""
    state = _TimedState(turn.course)
    tokens = walk(state, rng, soft_limit=100, hard_limit=1500)
    if not state.is_complete:
        return "unfinished"
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    try:
        return "valid" if validator.is_valid(json.loads(parse(tokens).content)) else "invalid"
    except ValueError:
        return "invalid"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--documents", type=int, default=3, help="for each schema")
    arguments = parser.parse_args()
    start = time.process_time()
    tokenizer()
    print(f"tokenizer: {time.process_time() - start:.2f} s")
    schemas: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    compile_seconds: list[float] = []
    for index, entry in enumerate(json.loads(arguments.file.read_text())):
        schema = entry["schema"]
        start = time.process_time()
        try:
            rules = TurnRules(answer=json_schema_format(schema, "schema"), max_reasoning_tokens=0)
            turn = compile_turn(rules)
        except RequestError:
            schemas["refused"] += 1
            continue
        compile_seconds.append(time.process_time() - start)
        schemas["enforced"] += 1
        for number in range(arguments.documents):
            found = check(schema, turn, random.Random(index * 1000 + number))
            documents[found] += 1
            if found != "valid":
                print(f"schema {index}, document {number}: {found}")
    print(f"schemas: {dict(schemas)}; documents: {dict(documents)}")
    for name, seconds, scale in (("compile ms", compile_seconds, 1e3), ("mask us", _TimedState.seconds, 1e6)):
        p50, p95, p99, most = np.percentile(seconds, [50, 95, 99, 100]) * scale
        print(f"{name}: {len(seconds):,} times, p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, most {most:.1f}")


if __name__ == "__main__":
    main()
