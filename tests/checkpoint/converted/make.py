"""Makes GGUF files with llama.cpp's own converter: the two beside this file, and what the live test asks for.

python -m tests.checkpoint.converted.make LLAMA_CPP    writes tiny-bf16.gguf and tiny-q8_0.gguf here

LLAMA_CPP: a folder with convert_hf_to_gguf.py, conversion/ and gguf-py/ (README.md says where to get one).
The Python that runs this needs torch, transformers and this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harmonium.harmony.tokenizer_json import write_tokenizer_json
from harmonium.harmony.vocabulary import SPECIAL_TOKENS
from harmonium.testing import make_tiny_checkpoint

HERE = Path(__file__).parent

SIZES = {"vocabulary_size": 288, "num_layers": 2, "seed": 6}
"""Of the source, for make_tiny_checkpoint."""

OUTTYPES = ("bf16", "q8_0")

_START = """
import runpy, sys
sys.path[:0] = ["gguf-py", "."]
from conversion.base import TextModel
if {patched}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
sys.argv[0] = "convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The converter knows a vocabulary by how it splits a sample, which its first tokens alone do otherwise."""


def convert(llama_cpp: Path, source: Path, target: Path, *options: str, patched: bool = False) -> Path:
    """Run the converter on a folder with a checkpoint and a tokenizer. Raises RuntimeError."""
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-c", _START.format(patched=patched), str(source), "--outfile", str(target), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=llama_cpp, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the converter failed:\n{done.stderr[-4000:]}")
    return target


def with_tokenizer(folder: Path, vocabulary_size: int | None = None) -> Path:
    """Write tokenizer.json and its config into a checkpoint's folder: all of ours, or its first tokens."""
    write_tokenizer_json(folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>"}
    if vocabulary_size is not None:
        _cut(folder / "tokenizer.json", vocabulary_size)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        assert config["eos_token"] in SPECIAL_TOKENS.values()
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _cut(path: Path, vocabulary_size: int) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    model = table["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < vocabulary_size}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    model["vocab"] = kept
    table["added_tokens"] = []
    path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    llama_cpp = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        source = with_tokenizer(
            make_tiny_checkpoint(Path(folder) / "tiny", **SIZES), SIZES["vocabulary_size"]
        )
        for outtype in OUTTYPES:
            target = HERE / f"tiny-{outtype}.gguf"
            convert(llama_cpp, source, target, "--outtype", outtype, patched=True)
            print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
