"""The trained checkpoint -> the packed file of the package: `python -m demo.export runs/demo`."""

from __future__ import annotations

import lzma
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.mixture import used_tokens
from harmonium.checkpoint.safetensors import SafetensorsFile, write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME
from harmonium.demo import CONFIG_TEXT, PACKED_FILE, USED_TOKENS, VOCABULARY_TENSORS
from harmonium.finetune.export import WEIGHTS_NAME

_Tensor = tuple[str, str, npt.NDArray[Any]]


def tensors(file: SafetensorsFile, used: Sequence[int]) -> Iterator[_Tensor]:
    """What the packed file holds, but for the config. used: token ids, ascending.

    Raises ValueError when rows of the vocabulary that are not used differ: they could not be shared.
    """
    yield USED_TOKENS, "I32", np.array(used, np.int32)
    for name, entry in file.entries.items():
        array = np.asarray(file.view(entry.dtype, entry.shape, entry.offset))
        if name in VOCABULARY_TENSORS:
            others = np.delete(array, used, axis=0)
            if (others != others[0]).any():
                raise ValueError(f"{name}: rows that training never saw differ; expected one shared row")
            array = np.concatenate([others[:1], array[used]])
        yield name, entry.dtype, array


def pack(checkpoint: Path, used: Sequence[int], target: Path) -> None:
    """Write the packed file of a checkpoint that `harmonium finetune` wrote."""
    file = SafetensorsFile(checkpoint / WEIGHTS_NAME)
    try:
        text = np.frombuffer((checkpoint / CONFIG_NAME).read_bytes(), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "compact"
            write_safetensors(plain, [*tensors(file, used), (CONFIG_TEXT, "U8", text)])
            target.write_bytes(lzma.compress(plain.read_bytes(), format=lzma.FORMAT_XZ, preset=9))
    finally:
        file.close()


def main() -> None:
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else PACKED_FILE
    pack(Path(sys.argv[1]), used_tokens(), target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
