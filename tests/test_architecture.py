"""The house keeps its floors, and the command line is light."""

from __future__ import annotations

import ast
import json
import resource
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VTRIAL = Path(sys.executable).parent / "vtrial"
HEAVY = ("torch", "pandas", "pyarrow", "scipy", "ray", "nibabel", "pydicom", "matplotlib", "totalsegmentator")
TABLES_ONLY = (
    *("cohort", "records", "runs", "execution", "storage", "geometry", "randomness", "organs"),
    *("measurement", "validation"),
)


def contracts(repository: Path) -> dict[str, dict[str, Any]]:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["id"]: contract for contract in settings["contracts"]}


def imported(repository: Path) -> Iterator[tuple[str, str]]:
    """(module, top-level package it imports anywhere in its text), read without the linter."""
    for path in sorted((repository / "vtrial").rglob("*.py")):
        module = ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield module, node.module.split(".")[0]


def test_import_contracts_are_kept(repository: Path) -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


def test_the_contracts_leave_nothing_out(repository: Path) -> None:
    """A contract weakened in pyproject would pass the linter: so its terms are held here."""
    held = contracts(repository)
    assert held["floors"]["exhaustive"] is True
    assert "exhaustive_ignores" not in held["floors"] and "ignore_imports" not in held["floors"]
    assert held["ray"]["ignore_imports"] == ["vtrial.cluster.** -> ray"]
    assert all(line.startswith("vtrial.imaging") for line in held["formats"]["ignore_imports"])
    present = {p.stem for p in (repository / "vtrial").iterdir()}
    assert set(held["torch"]["source_modules"]) == {f"vtrial.{name}" for name in TABLES_ONLY if name in present}


@pytest.mark.parametrize(("package", "homes"), [("ray", "cluster"), ("nibabel", "imaging"), ("pydicom", "imaging")])
def test_a_package_has_one_home(repository: Path, package: str, homes: str) -> None:
    users = {module.split(".")[1] for module, name in imported(repository) if name == package}
    assert users <= {homes}


def test_no_module_uses_global_seeds(repository: Path) -> None:
    """Generators are arguments; torch's own is seeded only where `fork_rng` gives it back as it was."""
    for path in sorted((repository / "vtrial").rglob("*.py")):
        text = path.read_text()
        calls = ["np.random.seed(", "torch.seed(", *([] if "fork_rng(" in text else ["torch.manual_seed("])]
        assert not [call for call in calls if call in text], f"{path.name} seeds globally: take a generator as argument"


def test_help_is_there_in_a_third_of_a_second() -> None:
    """Median of five, in processor time: wall time on a quiet machine, and the same on a busy one."""
    if not VTRIAL.exists():
        pytest.skip("vtrial is not installed as a command beside this Python")
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([str(VTRIAL), "--help"], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0, result.stderr
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(seconds) < 0.3, seconds


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import json, sys, vtrial.cli; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
