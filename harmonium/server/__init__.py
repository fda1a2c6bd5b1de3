"""The HTTP API: JSON in, chat events of the engine out as JSON or server-sent events. See docs/api.md.

`create_app(state)` makes the application; `harmonium.server.serve` runs it. Nothing here computes: the room
sees chat, harmony and the engine's protocol.
"""

from harmonium.server.app import create_app
from harmonium.server.config import Limits, ServerConfig
from harmonium.server.state import ServerState

__all__ = ["Limits", "ServerConfig", "ServerState", "create_app"]
