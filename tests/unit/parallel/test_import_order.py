"""`portable` comes before Megatron in every module: after it, torch's compiler is loaded, half of a process's start."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = [path for folder in ("megatron_offgrpo", "checkpoints_conversion") for path in (ROOT / folder).rglob("*.py")]


def imported(path: Path) -> list[str]:
    """What the module imports when it is loaded, in order, as module.name."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


OF_MEGATRON = [path for path in FILES if any(name.startswith("megatron.") for name in imported(path))]


@pytest.mark.parametrize("path", OF_MEGATRON, ids=lambda path: path.stem)
def test_portable_is_the_first_import(path):
    assert imported(path)[0] == "megatron_offgrpo.parallel.portable"


def test_there_are_such_modules():
    assert {"layers", "student", "safe_load"} <= {path.stem for path in OF_MEGATRON}
