"""The README and the pages of docs/: their texts, code blocks, command lines and tables."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (*PAGES, ROOT / "README.md")}
PLACEHOLDERS = {"METHOD": "vanilla", "E": "4"}
EXTENDING = "extending.md"  # its commands need its changes: `test_extending.py`
STUDY = "study.md"  # its commands train for long: `test_study.py`


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def prose(text):
    """Return a page without its fenced blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def command_lines(text):
    """Yield the arguments of every `mixmo` command in the code blocks of a page."""
    shell = "\n".join(blocks(text, "bash"))
    shell += "\n" + "\n".join(re.findall(r"^    (.*)$", prose(text), flags=re.MULTILINE))
    for line in shell.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            arguments = shlex.split(re.sub(r"\b(METHOD|E)\b", lambda m: PLACEHOLDERS[m[0]], part))
            if ">" in arguments:
                arguments = arguments[: arguments.index(">")]
            if "mixmo_fastai" in arguments:
                yield arguments[arguments.index("mixmo_fastai") + 1 :]
            elif arguments[:1] == ["mixmo"]:
                yield arguments[1:]


def tables(text):
    """Return the tables of a page as lists of rows, which map column names to cells."""
    matches = re.findall(r"^(\|.*\|)\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, flags=re.MULTILINE)
    return [[dict(zip(cells(head), cells(row), strict=True)) for row in body.splitlines()]
            for head, body in matches]  # fmt: skip


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(page, *columns):
    """Return the rows of the tables of a page that have these columns."""
    return [r for rows in tables(TEXTS[page]) for r in rows if set(columns) <= rows[0].keys()]


def names_in(text):
    return re.findall(r"`([^`\n]+)`", text)
