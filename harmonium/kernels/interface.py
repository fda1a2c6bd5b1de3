"""Whether the native module that is installed is the one that this package was written for.

The two part when a source tree is updated and not built again, or a package is copied over an older one. The
first kernel that changed would then fail in the middle of a request.
"""

from __future__ import annotations

from typing import Any

from harmonium.errors import ConfigError

INTERFACE = 5
"""kInterface of native/bindings.h: raised there and here whenever a bound function's arguments change."""

_REMEDY = (
    "install harmonium again (pip install . in its source tree), or run ./dev-build where it is used in place"
)


def check_native() -> None:
    """Raises ConfigError when the native module is missing, cannot be loaded, or is another version's."""
    try:
        from harmonium import _native
    except ImportError as error:
        raise ConfigError(f"harmonium's native module cannot be loaded ({error}); {_REMEDY}") from error
    check_interface(_native)


def check_interface(module: Any) -> None:
    """Raises ConfigError when a native module has another interface than this package calls."""
    found = getattr(module, "interface", None)
    if found != INTERFACE:
        version = "older than this check" if found is None else f"{found}"
        where = getattr(module, "__file__", "harmonium._native")
        raise ConfigError(
            f"the native module {where} is another version's: its interface is {version}, expected "
            f"{INTERFACE}; {_REMEDY}"
        )


check_native()  # at import: the modules that call it are imported after this one
