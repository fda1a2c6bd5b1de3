"""`demo` is a folder of the repository beside the package: it is found there, wherever the tests run from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2] / "demo"

if "demo" not in sys.modules:
    # Not by a path: the root would put the source tree before the harmonium that is installed.
    _spec = importlib.util.spec_from_file_location(
        "demo", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    assert _spec is not None and _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["demo"] = _module
    _spec.loader.exec_module(_module)
