"""The demo model: a true gpt-oss checkpoint that travels in the package, unpacked once into the user's cache.

It is small (docs/demo.md says what it can do). The vocabulary is the real one, 201,088 rows, but only some
thousand tokens were trained; all other rows are one shared vector, so the package holds that vector once.

Layout of `demo_model.xz`: a safetensors file with the tensors of a Hugging Face checkpoint, in which
`model.embed_tokens.weight` and `lm_head.weight` have U rows: the shared one, then those of the tokens in
`used_token_ids` (I32 [U - 1], ascending). `config_json` (U8) is the text of config.json.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.safetensors import SafetensorsFile, write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME
from harmonium.config import cache_folder
from harmonium.errors import CheckpointError, ConfigError

PACKED_FILE = Path(__file__).with_name("demo_model.xz")
MODEL_NAME = "harmonium-demo"
USED_TOKENS = "used_token_ids"
CONFIG_TEXT = "config_json"
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")

_WEIGHTS_NAME = "model.safetensors"
_Tensor = tuple[str, str, npt.NDArray[Any]]


def demo_checkpoint_path(packed_file: Path = PACKED_FILE) -> Path:
    """The demo model's folder in the user's cache, made when it is not there yet (about 215 MB, a second).

    The folder's name is derived from the packed bytes, so that another version gets another folder. It
    appears whole or not at all; processes that make it at once do not disturb each other. Raises
    CheckpointError when the packed file is missing or damaged, ConfigError when the cache cannot be written.
    """
    try:
        packed = packed_file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{packed_file}: the demo model is not in this installation ({error})"
        ) from None
    folder = cache_folder() / f"demo-{hashlib.sha256(packed).hexdigest()[:12]}" / MODEL_NAME
    if not (folder / CONFIG_NAME).is_file():
        _unpack(packed, packed_file, folder)
    return folder


def _unpack(packed: bytes, packed_file: Path, folder: Path) -> None:
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        compact = temporary / "compact"
        compact.write_bytes(_decompress(packed, packed_file))
        _write_checkpoint(compact, temporary)
        compact.unlink()
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        # Another process may have been faster; its folder is whole.
        if not (folder / CONFIG_NAME).is_file():
            raise ConfigError(f"{folder}: the demo model cannot be unpacked ({error})") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _decompress(packed: bytes, packed_file: Path) -> bytes:
    """xz carries a checksum of the content, which this compares."""
    try:
        return lzma.decompress(packed, format=lzma.FORMAT_XZ)
    except lzma.LZMAError as error:
        raise CheckpointError(f"{packed_file}: damaged ({error}); install the package again") from None


def _write_checkpoint(compact: Path, folder: Path) -> None:
    """config.json last, as it stands for a whole checkpoint."""
    file = SafetensorsFile(compact)
    try:
        views = {
            name: (entry.dtype, file.view(entry.dtype, entry.shape, entry.offset))
            for name, entry in file.entries.items()
        }
        config = views[CONFIG_TEXT][1].tobytes()
        write_safetensors(folder / _WEIGHTS_NAME, _expanded(views, json.loads(config)["vocab_size"]))
        (folder / CONFIG_NAME).write_bytes(config)
    finally:
        file.close()


def _expanded(views: dict[str, tuple[str, npt.NDArray[Any]]], vocabulary_size: int) -> Iterator[_Tensor]:
    """The tensors of the checkpoint: every token has its row."""
    row_of_token = np.zeros(vocabulary_size, np.int64)
    used = views[USED_TOKENS][1]
    row_of_token[used] = np.arange(1, len(used) + 1)
    for name, (dtype, array) in views.items():
        if name in VOCABULARY_TENSORS:
            yield name, dtype, array[row_of_token]
        elif name not in (USED_TOKENS, CONFIG_TEXT):
            yield name, dtype, array
