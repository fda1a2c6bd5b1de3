"""Models by name: found in the caches of this machine, or downloaded from Hugging Face or ModelScope."""

from harmonium.hub.download import PullOptions, pull
from harmonium.hub.headers import skeleton
from harmonium.hub.local import find_local
from harmonium.hub.names import HubName, may_be_path, parse_name
from harmonium.hub.settings import SOURCES, HubSettings, checked_source, hub_settings

__all__ = [
    "SOURCES",
    "HubName",
    "HubSettings",
    "PullOptions",
    "checked_source",
    "find_local",
    "hub_settings",
    "may_be_path",
    "parse_name",
    "pull",
    "skeleton",
]
