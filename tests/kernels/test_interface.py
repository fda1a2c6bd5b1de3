"""A native module of another version is refused with the way out, and its number follows its functions."""

from __future__ import annotations

import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from harmonium import _native
from harmonium.errors import ConfigError
from harmonium.kernels import interface

NATIVE = Path(__file__).parents[2] / "native"

BOUND = "58086ef2686b1b3a"
"""Digest of all bound functions and their arguments at interface.INTERFACE."""


def test_this_module_has_this_packages_interface() -> None:
    interface.check_interface(_native)
    assert _native.interface == interface.INTERFACE


@pytest.mark.parametrize("found", [{}, {"interface": interface.INTERFACE - 1}])
def test_module_of_another_version_is_refused_with_the_fix(found: dict[str, int]) -> None:
    module = SimpleNamespace(__file__="/lib/_native.so", **found)
    with pytest.raises(ConfigError, match=r"native module /lib/_native\.so is another version's.*dev-build"):
        interface.check_interface(module)


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        ("sys.modules['harmonium._native'] = types.ModuleType('harmonium._native')", "another version's"),
        ("sys.modules['harmonium._native'] = None", "cannot be loaded"),
    ],
)
def test_command_says_it_in_one_line(setup: str, told: str) -> None:
    code = f"import sys, types\n{setup}\nfrom harmonium.cli import main\nsys.exit(main(['inspect', 'tiny']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("harmonium: ") and told in last
    assert "Traceback" not in done.stderr and "pip install ." in last


def test_number_is_raised_when_functions_change() -> None:
    """Whoever changes a bound function raises kInterface and INTERFACE, then puts the new digest here."""
    texts = [path.read_text() for path in sorted(NATIVE.glob("*.cpp"))]
    calls = [_call(text[found.start() :]) for text in texts for found in re.finditer(r"m\.def\(", text)]
    assert len(calls) > 25
    digest = sha256("\n".join(sorted(calls)).encode()).hexdigest()[:16]
    assert digest == BOUND, f"bound functions changed: raise the number in both places; digest {digest}"
    number = re.search(r"kInterface = (\d+);", (NATIVE / "bindings.h").read_text())
    assert number is not None and int(number[1]) == interface.INTERFACE


def _call(text: str) -> str:
    """The function's name and its arguments' names and defaults: m.def(...) without its code."""
    name = re.match(r'm\.def\(\s*"(\w+)"', text)
    assert name is not None, text[:80]
    end = text.find("m.def(", 6)
    return name[1] + " " + " ".join(re.findall(r'nb::arg\("\w+"\)[^,;]*', text[: end if end > 0 else None]))
