"""Pack o200k_base.tiktoken into the file that the package carries.

    python tools/pack_vocabulary.py o200k_base.tiktoken harmonium/harmony/o200k_base.xz

The packed file is xz over: one byte of length for each of the 199,998 tokens in the order of their ids, then
the tokens' bytes without a gap. Source of the input: the vocabulary that OpenAI publishes with tiktoken
(MIT).
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import sys
from pathlib import Path

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def pack(tiktoken_file: bytes) -> bytes:
    """The packed form of a .tiktoken file whose ids count up from 0. Raises ValueError for any other file."""
    if hashlib.sha256(tiktoken_file).hexdigest() != SHA256:
        raise ValueError(f"the input is not o200k_base.tiktoken: its SHA-256 is not {SHA256}")
    tokens = []
    for number, line in enumerate(tiktoken_file.splitlines()):
        encoded, rank = line.split()
        if int(rank) != number:
            raise ValueError(f"line {number + 1} holds id {int(rank)}; expected {number}")
        tokens.append(base64.b64decode(encoded))
    lengths = bytes(len(token) for token in tokens)
    return lzma.compress(lengths + b"".join(tokens), preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: pack_vocabulary.py o200k_base.tiktoken OUTPUT")
    Path(sys.argv[2]).write_bytes(pack(Path(sys.argv[1]).read_bytes()))
