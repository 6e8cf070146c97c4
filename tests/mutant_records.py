"""The settings of `mutants.py`, its equivalent mutants, and the results of earlier runs."""

import functools
import hashlib
import json
import re
import tomllib
from pathlib import Path

from mutations import find_mutations

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "mixmo_fastai"
SETTINGS = tomllib.loads((TESTS / "mutants.toml").read_text(encoding="utf-8"))


def mutations_of(module):
    return find_mutations((PACKAGE / module).read_text(encoding="utf-8"))[1]


def equivalent_keys(mutations, entries):
    """Return the keys of a module's mutations that its entries of `mutants.toml` list.

    Raises:
        ValueError: an entry does not describe exactly `count` mutations, 1 by default.
    """
    keys = set()
    for entry in entries:
        place, count = (entry["scope"], entry["line"]), entry.get("count", 1)
        for change in entry["changes"]:
            found = [m.key for m in mutations if (m.scope, m.line, m.change) == (*place, change)]
            if len(found) != count:
                raise ValueError(
                    f"An equivalent of mutants.toml matches {len(found)} mutants of "
                    f"{entry['module']} instead of {count}; correct or remove it:\n"
                    f"  {' | '.join([*place, change])}"
                )
            keys.update(found[i] for i in entry.get("occurrences", range(count)))
    return keys


def equivalents_of(module):
    entries = [entry for entry in SETTINGS["equivalent"] if entry["module"] == module]
    return equivalent_keys(mutations_of(module), entries)


def check_equivalents():
    """Check all entries of `mutants.toml`; raise ValueError for the first wrong one."""
    for module in dict.fromkeys(entry["module"] for entry in SETTINGS["equivalent"]):
        if module not in SETTINGS["tests"]:
            raise ValueError(f"mutants.toml has equivalents of {module}, but no tests.")
        equivalents_of(module)


def file_of(test):
    """Return the name of a test's file; None for no test."""
    return Path(test.partition("::")[0]).name if test else None


@functools.cache
def digest(module, file=None):
    """Return a digest of the files from which a result follows, as they are at the first call.

    Args:
        module: the mutated module.
        file: the file of the test that noticed the mutant; None for all test files of the module.
    """
    judges = [file] if file else SETTINGS["tests"][module]
    waiting, texts = ["conftest.py", *judges], {}
    while waiting:
        path = TESTS / waiting.pop()
        if path.name not in texts and path.is_file():
            texts[path.name] = text = path.read_text(encoding="utf-8")
            imported = re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)
            waiting += [f"{name}.py" for name in imported]
    parts = [(PACKAGE / module).read_text(encoding="utf-8"), sorted(texts.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_results(path):
    """Return the results in a file by module and key, without those of edited files."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        result = json.loads(line)
        module, file = result["module"], file_of(result["by"])
        files = SETTINGS["tests"].get(module, [])
        is_judge = file in files if file else bool(files)
        if is_judge and result.get("files") == digest(module, file):
            results[module, result["key"]] = result
    return results
