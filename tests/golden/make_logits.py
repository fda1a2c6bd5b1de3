"""Makes logits.npz: what Transformers' GptOss says about the tiny models of tests/model/tiny_models.py.

    PYTHONPATH=. python tests/golden/make_logits.py

Needs torch and transformers (the extra [oracle]), about 5 GB of memory and two minutes. Float32, eager
attention. Only a few positions of each prompt are kept. Head size 64 uses our rotary frequencies
(docs/numerics.md says why); for the other head sizes Transformers' own are the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.model.tiny_models import CONFIGS, PROMPT_LENGTHS, kept_positions, prompt, tiny_checkpoint
from tests.model.transformers_oracle import transformers_logits, transformers_model


def main() -> None:
    arrays: dict[str, Any] = {}
    for name in CONFIGS:
        checkpoint = tiny_checkpoint(name)
        arrays[f"{name}/fingerprint"] = np.array(checkpoint.fingerprint())
        oracle = transformers_model(checkpoint, our_frequencies=checkpoint.config.head_size == 64)
        for length in PROMPT_LENGTHS:
            logits_TV = transformers_logits(oracle, prompt(name, length))
            arrays[f"{name}/{length}"] = logits_TV[kept_positions(name, length)]
            print(name, length, arrays[f"{name}/{length}"].shape, flush=True)
    np.savez_compressed(Path(__file__).parent / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
