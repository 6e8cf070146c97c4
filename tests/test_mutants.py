"""The settings of `mutants.py`, and the mutations of a source text."""

import ast
import json
import sys

import mutant_records
import mutants
import pytest
from mutant_records import PACKAGE, SETTINGS, TESTS, file_of
from mutations import find_mutations


def changes(source):
    return [mutation.change for mutation in find_mutations(source)[1]]


def test_modules_and_test_files_exist():
    for module, files in SETTINGS["tests"].items():
        assert (PACKAGE / module).is_file()
        assert all((TESTS / name).is_file() for name in files), module


def test_each_equivalent_mutant_is_one_of_the_source():
    mutant_records.check_equivalents()
    assert all(entry["reason"] for entry in SETTINGS["equivalent"])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "expected 1 got 2"),
        ({"count": 2}, [0, 1]),
        ({"count": 2, "occurrences": [1]}, [1]),
        ({"scope": "g"}, [0]),
        ({"scope": ""}, "expected 1 got 0"),
        ({"line": "return 1"}, "expected 1 got 0"),
        ({"changes": ["1 -> 3"], "count": 2}, "expected 2 got 0"),
    ],
)
def test_an_equivalent_describes_an_exact_number_of_mutants_of_one_function(settings, found):
    source = "def f(a):\n    if a:\n        b = 1\n    b = 1\ndef g():\n    b = 1\n"
    mutations = find_mutations(source)[1]
    entry = {"module": "m.py", "scope": "f", "line": "b = 1", "changes": ["1 -> 2"]} | settings
    if isinstance(found, list):
        keys = {f"{entry['scope']} | b = 1 | 1 -> 2 | {number}" for number in found}
        assert mutant_records.equivalent_keys(mutations, [entry]) == keys
    else:
        _, expected, _, got = found.split()
        with pytest.raises(
            ValueError, match=f"matches {got} mutants of m.py instead of {expected};"
        ):
            mutant_records.equivalent_keys(mutations, [entry])


def test_equivalents_of_a_module_without_tests_are_refused(monkeypatch):
    monkeypatch.setitem(SETTINGS, "equivalent", [{"module": "other.py"}])
    with pytest.raises(ValueError, match=r"equivalents of other\.py, but no tests"):
        mutant_records.check_equivalents()


def test_a_wrong_equivalent_ends_the_program(monkeypatch):
    entry = SETTINGS["equivalent"][0] | {"scope": "a_removed_function"}
    monkeypatch.setitem(SETTINGS, "equivalent", [entry])
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--summary"])
    with pytest.raises(
        SystemExit, match=r"0 mutants .*; correct or remove it:\n  a_removed_function"
    ):
        mutants.main()


def test_the_summary_names_equivalents_that_were_noticed(capsys):
    module = SETTINGS["equivalent"][0]["module"]
    first, *others = sorted(mutant_records.equivalents_of(module))
    outcomes = {first: "noticed", **dict.fromkeys(others, "survived")}
    results = {(module, key): {"outcome": outcome} for key, outcome in outcomes.items()}
    assert not mutants.summarize([module], results)
    _, _, listed = capsys.readouterr().out.partition("Listed as equivalent, but noticed:\n")
    assert listed == f"  {module}: {first}\n"
    results[module, first] = {"outcome": "survived"}
    assert mutants.summarize([module], results)
    key = next(m.key for m in mutant_records.mutations_of(module) if m.key not in {first, *others})
    results[module, key] = {"outcome": "survived"}
    assert not mutants.summarize([module], results)


def test_an_unknown_module_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--only", "mixing/none"])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "--only mixing/none: no such module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edited", "kept"),
    [
        ("package/a.py", set()),
        ("tests/conftest.py", set()),
        ("tests/test_one.py", {"noticed by two"}),
        ("tests/test_two.py", {"noticed by one"}),
        ("tests/helper.py", {"noticed by one"}),  # imported by two
        ("tests/inner.py", {"noticed by one"}),  # imported by the helper
        ("tests/test_other.py", {"noticed by one", "noticed by two", "survived", "time limit"}),
        ("settings", {"noticed by one"}),
    ],
)
def test_results_are_kept_until_their_module_or_tests_are_edited(
    monkeypatch, tmp_path, edited, kept
):
    texts = {
        "package/a.py": "A = 1",
        "tests/conftest.py": "",
        "tests/test_one.py": "import a\n",
        "tests/test_two.py": "import a\nfrom helper import b\n",
        "tests/helper.py": "def b():\n    import inner\n",
        "tests/inner.py": "",
        "tests/test_other.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(mutant_records, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(mutant_records, "TESTS", tmp_path / "tests")
    monkeypatch.setitem(SETTINGS, "tests", {"a.py": ["test_one.py", "test_two.py"]})
    judges = {
        "noticed by one": "tests/test_one.py::test_a",
        "noticed by two": "tests/test_two.py::test_a[1]",
        "survived": None,
        "time limit": None,
    }
    digest = mutant_records.digest.__wrapped__
    monkeypatch.setattr(mutant_records, "digest", digest)
    file = tmp_path / "results"
    lines = [
        json.dumps({"module": "a.py", "key": key, "by": by, "files": digest("a.py", file_of(by))})
        for key, by in judges.items()
    ]
    old = {"module": "a.py", "key": "of an earlier version", "by": None}
    file.write_text("\n".join([*lines, json.dumps(old)]))
    assert {key for _, key in mutant_records.read_results(file)} == set(judges)
    if edited == "settings":
        monkeypatch.setitem(SETTINGS, "tests", {"a.py": ["test_one.py"]})
    else:
        (tmp_path / edited).write_text("edited")
    assert {key for _, key in mutant_records.read_results(file)} == kept


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
