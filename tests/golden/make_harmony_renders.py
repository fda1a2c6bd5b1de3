"""Write harmony_renders.json: the Harmony library's renders of tests/harmony/conversations.py.

    PYTHONPATH=. python tests/golden/make_harmony_renders.py

Each case keeps the text (special tokens by name) and the SHA-256 of the ids, comma-separated.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import openai_harmony

from harmonium.harmony import vocabulary
from tests.harmony.conversations import cases, library_ids


def main() -> None:
    renders = {}
    for name, conversation in cases().items():
        ids = library_ids(openai_harmony, conversation)
        digest = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
        renders[name] = {"text": vocabulary().decode(ids), "ids_sha256": digest}
    path = Path(__file__).with_name("harmony_renders.json")
    path.write_text(json.dumps(renders, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
