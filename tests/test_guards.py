"""The house rules that a machine can hold: the mirror, and where frameworks may be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("openpi_port", "configs", "convert", "experiments")
FLAX, TORCH = (ROOT / "openpi_port" / side for side in ("pi_flax", "pi_torch"))
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "triton"}


def public(path: Path) -> list[str]:
    """Public classes with their public methods, and functions, in the order of the file."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            calls = {"__call__": "forward"}  # the same thing in the words of either framework
            methods = [calls.get(n.name, n.name) for n in node.body if isinstance(n, ast.FunctionDef)]
            names += [f"{node.name}.{m}" for m in methods if not m.startswith("_")]
    return names


def test_same_files():
    assert sorted(p.name for p in FLAX.glob("*.py")) == sorted(p.name for p in TORCH.glob("*.py"))


@pytest.mark.parametrize("name", sorted(p.name for p in FLAX.glob("*.py")))
def test_same_names_in_the_same_order(name):
    assert public(FLAX / name) == public(TORCH / name)


def test_the_fast_rooms_have_the_same_door():
    """How a prepared model computes differs by nature; how it is asked does not."""
    assert public(FLAX / "fast" / "prepare.py") == public(TORCH / "fast" / "prepare.py")


def test_convert_can_be_imported_first():
    """The two packages import each other; whichever comes first must work."""
    subprocess.run([sys.executable, "-c", "import convert.layout"], cwd=ROOT, check=True)


def frameworks_of(path: Path) -> set[str]:
    """Top-level names of the frameworks that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found & FRAMEWORKS


def test_frameworks_stay_in_their_rooms():
    allowed = {"pi_flax": FRAMEWORKS - {"torch", "triton"}, "pi_torch": {"torch", "triton"}}
    strays = {
        str(path.relative_to(ROOT)): sorted(frameworks_of(path) - allowed.get(path.relative_to(ROOT).parts[1], set()))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: names for path, names in strays.items() if names} == {}
