"""Harmonium runs OpenAI's open-weight gpt-oss models on the machine you have.

    from harmonium import LLM

    with LLM("path/to/gpt-oss-20b") as llm:
        print(llm.chat("Why is the sky blue?").content)

Names are loaded when they are first used, so that `import harmonium` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmonium.config import EngineConfig as EngineConfig
    from harmonium.errors import HarmoniumError as HarmoniumError
    from harmonium.llm import LLM as LLM
    from harmonium.model.batch import SamplingParams as SamplingParams

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "harmonium.llm",
    "EngineConfig": "harmonium.config",
    "HarmoniumError": "harmonium.errors",
    "SamplingParams": "harmonium.model.batch",
}

__all__ = ["LLM", "EngineConfig", "HarmoniumError", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'harmonium' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
