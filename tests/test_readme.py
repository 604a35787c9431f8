"""What the README shows works: Python is run, commands exist with the options shown, files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VTRIAL = Path(sys.executable).parent / "vtrial"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in fenced("bash") for line in block.splitlines()]
    return [words for words in lines if words and words[0] == program]


@cache
def help_of(command: str) -> str:
    result = subprocess.run([str(VTRIAL), command, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"vtrial {command}: {result.stderr}"
    return result.stdout


@pytest.mark.parametrize("code", fenced("python"))
def test_python_snippets_run(code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("words", commands("vtrial"), ids=" ".join)
def test_commands_take_the_options_shown(words: list[str]) -> None:
    if not VTRIAL.exists():
        pytest.skip("vtrial is not installed as a command beside this Python")
    text = help_of(words[1])
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"vtrial {words[1]} has no {option}"


@pytest.mark.parametrize("words", [w for w in commands("vtrial") if w[1] == "recruit"], ids=" ".join)
def test_recruit_commands_run(words: list[str], tmp_path: Path) -> None:
    if not VTRIAL.exists():
        pytest.skip("vtrial is not installed as a command beside this Python")
    result = subprocess.run([str(VTRIAL), *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).stat().st_size > 0


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = [words[1] for words in commands("make")] + re.findall(r"`make ([\w-]+)`", README)
    assert shown and set(shown) <= targets


def test_files_named_are_there() -> None:
    named = set(re.findall(r"(?:cohorts|configs|docs)/[\w./-]*\w", README))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = re.search(r"^vtrial/\n(.*?)^cohorts/", README, flags=re.MULTILINE | re.DOTALL)
    assert tree is not None
    entries = re.findall(r"^  ((?:[\w]+(?:\.py|/)(?:, )?)+)", tree[1], flags=re.MULTILINE)
    told = {name for entry in entries for name in entry.split(", ")}
    there = {p.name for p in (ROOT / "vtrial").glob("*.py") if p.name != "__init__.py"}
    there |= {f"{p.parent.name}/" for p in (ROOT / "vtrial").glob("*/__init__.py")}
    assert told - {"assets/"} == there
