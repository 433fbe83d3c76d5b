"""docs/cli.md names every command and every option with its default, and nothing that is gone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from fvgen.cli.parser import build_parser

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
HEADINGS = {
    "generate": "Generate",
    "render": "Render",
    "convert": "Convert",
    "demo": "Demo, doctor",
    "doctor": "Demo, doctor",
    "prepare": "Prepare",
    "distill": "Distill",
    "export-student": "Export a student",
    "train-tiny": "Train the tiny model",
    "bench": "Bench",
}
COMMANDS: dict[str, argparse.ArgumentParser] = next(
    a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)
)


def options(command: str) -> list[argparse.Action]:
    """All options of a command but --help."""
    return [a for a in COMMANDS[command]._actions if a.option_strings and not isinstance(a, argparse._HelpAction)]


def rows(text: str) -> dict[str, str]:
    """Default by option, from the rows of a section's tables."""
    found = re.findall(r"^\| (`--.+?) \| (.*?) ?\|", text.replace("\\|", "/"), re.MULTILINE)
    return {name: default.strip("`") for cell, default in found for name in re.findall(r"`(--[\w-]+)", cell)}


def test_every_command_has_a_section_and_a_row() -> None:
    assert set(HEADINGS) == set(COMMANDS)
    assert set(HEADINGS.values()) <= set(SECTIONS)
    assert set(re.findall(r"^\| `fvgen ([\w-]+)` \|", TEXT, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", HEADINGS)
def test_every_option_is_there(command: str) -> None:
    named = set(re.findall(r"`(--[\w-]+)", SECTIONS[HEADINGS[command]]))
    assert [s for a in options(command) for s in a.option_strings if s not in named] == []


@pytest.mark.parametrize("command", HEADINGS)
def test_every_row_is_true(command: str) -> None:
    known = {s: a for a in options(command) for s in a.option_strings}
    for name, default in rows(SECTIONS[HEADINGS[command]]).items():
        if name not in known:
            assert HEADINGS[command] == "Demo, doctor", name
        elif known[name].default is not None and not isinstance(known[name].default, bool):
            value = known[name].default
            assert default == (f"{value:g}" if isinstance(value, float) else str(value)), name


def test_rows_are_read() -> None:
    text = "| `--a N`, `--b` | 4 | x |\n| `--c` | `few` | y |\n| `--d` | | z |\n"
    assert rows(text) == {
        "--a": "4",
        "--b": "4",
        "--c": "few",
        "--d": "",
    }
