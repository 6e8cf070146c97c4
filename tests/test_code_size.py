"""Files and functions stay short enough to be read in one sitting."""

import ast
import statistics
from pathlib import Path

import pytest

import mixmo_fastai

PACKAGE = Path(mixmo_fastai.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))
ROOT = TESTS.parent
PROGRAMS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES, MAX_ROOT_MODULES = 400, 60, 12, 5
LONG = "# Long, since "  # the comment above a longer function, with the reason


def functions(path):
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            docstring = node.body[0] if ast.get_docstring(node) else None
            documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            length = node.end_lineno - node.lineno + 1
            yield node.name, length, documented, lines[first - 2].strip() if first > 1 else ""


@pytest.mark.parametrize(
    "path", FILES + PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for name, length, documented, comment in functions(path):
        is_short = length - documented <= MAX_FUNCTION_LINES
        assert is_short or comment.startswith(LONG), f"{name} has {length - documented} lines"


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_files_of_tests_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_most_functions_are_very_short():
    lengths = [length for path in FILES for _, length, _, _ in functions(path)]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_the_package_has_few_modules_outside_its_packages():
    assert len([*PACKAGE.glob("*.py")]) <= MAX_ROOT_MODULES
