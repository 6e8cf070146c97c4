"""The settings of `mutants.py`, and the mutations of a source text."""

import ast

import pytest
from mutants import PACKAGE, SETTINGS, TESTS
from mutations import find_mutations


def changes(source):
    return [mutation.change for mutation in find_mutations(source)[1]]


def test_modules_and_test_files_exist():
    for module, files in SETTINGS["tests"].items():
        assert (PACKAGE / module).is_file()
        assert all((TESTS / name).is_file() for name in files), module


@pytest.mark.parametrize("module", sorted({e["module"] for e in SETTINGS["equivalent"]}))
def test_each_equivalent_mutant_is_one_of_the_source(module):
    assert module in SETTINGS["tests"]
    mutations = find_mutations((PACKAGE / module).read_text(encoding="utf-8"))[1]
    found = {(mutation.line, mutation.change) for mutation in mutations}
    for entry in SETTINGS["equivalent"]:
        if entry["module"] == module:
            assert entry["reason"]
            for change in entry["changes"]:
                assert (entry["line"], change) in found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["a < b -> a <= b"]),
        ("x = a < b == c", ["a < b == c -> a <= b == c", "a < b == c -> a < b != c"]),
        ("x = a + -b", ["a + -b -> a - -b", "-b -> +b"]),
        ("x = 4", ["4 -> 5"]),
        ("x = True", ["True -> False"]),
        ("x = 0.4", ["0.4 -> 0.51"]),
        ("x = a if b else c", ["b -> not b"]),
        ("x = a and not b", ["a and (not b) -> a or not b", "not b -> not not b"]),
        ("if a is None: pass", ["a is None -> a is not None"]),
        ("if a > b: pass", ["a > b -> not a > b", "a > b -> a >= b"]),
        ("if not a: pass", ["not a -> not not a"]),
        ("x += a", ["x += a -> x -= a"]),
        ("def f(a: int = 3): pass", ["3 -> 4"]),
        ("def f(a: Literal[1]) -> Literal[2]: pass", []),
        ("'''Text 1.'''\n__all__ = [1]\nimport a", []),
        ("raise ValueError(1 + 2)", []),
        ("x = f'{1 + 2}'", []),
        ("warn(1)", []),
    ],
)
def test_mutations_of_a_text(source, expected):
    assert changes(source) == expected


def test_mutations_have_keys_of_their_own_and_change_one_place():
    source = (PACKAGE / "mixing/ratios.py").read_text(encoding="utf-8")
    mutations = find_mutations(source)[1]
    assert len({mutation.key for mutation in mutations}) == len(mutations)
    unchanged, texts = ast.unparse(ast.parse(source)), set()
    for index in range(len(mutations)):
        tree, again = find_mutations(source)
        again[index].apply()
        compile(tree, "mutant", "exec")
        text = ast.unparse(tree)
        lines = zip(text.splitlines(), unchanged.splitlines(), strict=True)
        assert sum(first != second for first, second in lines) == 1
        texts.add(text)
    assert len(texts) == len(mutations)


def test_lines_of_a_mutation_are_those_that_a_test_must_execute():
    source = "A = 1\ndef f(a=2):\n    b = 3\n    if b > a:\n        return 4\n    return 5\n"
    lines = {m.change: list(m.lines) for m in find_mutations(source)[1]}
    assert lines["1 -> 2"] == []  # any test
    assert lines["2 -> 3"] == [3, 4, 5, 6]
    assert lines["3 -> 4"] == [3]
    assert lines["b > a -> b >= a"] == [4]
    assert lines["4 -> 5"] == [5]
