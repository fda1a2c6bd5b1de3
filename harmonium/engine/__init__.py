"""Many requests share one model: token ids in, token ids out. See docs/engine.md.

`create_engine` is in `harmonium.engine.create`: it alone needs the native kernels.
"""

from harmonium.engine.local import LocalEngine
from harmonium.engine.protocol import Engine, EngineInfo, FinishReason, Request, Token, TokenEvent
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.engine.statistics import EngineStatistics

__all__ = [
    "Engine",
    "EngineInfo",
    "EngineStatistics",
    "FinishReason",
    "LocalEngine",
    "Request",
    "Script",
    "ScriptedEngine",
    "Token",
    "TokenEvent",
]
