"""Mutation testing: do the tests notice each changed operator, number and condition?

    python tests/mutants.py                            # all mutants that have no result yet
    python tests/mutants.py --only mixing/pairing.py   # those of one module
    python tests/mutants.py --survivors                # rerun survivors, against more tests

Each mutant differs from a module in one operator, number, truth value or condition. Only tests not
marked `slow` must notice it, and only those of the files that `mutants.toml` lists for the module.
A first run of these files records which tests execute which lines; a mutant is then judged by the
tests that execute its line, or with `--survivors` by all tests of the files. A mutant that exceeds
its time limit or ends its process counts as noticed.

`mutants.toml` also lists equivalent mutants, which no test could notice, with the reason; they are
run too, and counted as equivalent if they survive. An entry that describes another number of
mutants than it says is an error.

Results are appended to `--results`, one line of JSON each. A mutant with a result is run again
after an edit of its module or of the tests: of the file of the test that noticed it, or, if it
survived, of any file that `mutants.toml` lists for the module; in both cases also of what these
files import from `tests/`. Edits of other modules of the package do not count; to run all again,
remove the file. The exit status is 1 if a mutant survived that is not listed as equivalent, or if
one was noticed that is.

Existing tools were too slow or incomplete: mutmut skips decorated functions, default values and
module constants, and changes strings of messages; cosmic-ray starts a process per mutant, in which
importing torch and fastai takes longer than the tests. Here one process imports them once and forks
for each mutant (not on Windows).
"""

import argparse
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from mutant_records import (
    PACKAGE,
    SETTINGS,
    TESTS,
    check_equivalents,
    digest,
    equivalents_of,
    file_of,
    mutations_of,
    read_results,
)
from mutations import find_mutations

NO_TESTS_RUN = (4, 5)  # exit codes of pytest: wrong usage, nothing collected
PRELOADED = ("torch", "torchvision", "fastai.vision.all", "hypothesis", "scipy.stats", "pytest")


class MutatedModule(importlib.machinery.SourceFileLoader):
    """Import hook that provides the mutated code of one module."""

    def __init__(self, module, index):
        path = PACKAGE / module
        super().__init__("mixmo_fastai." + module.removesuffix(".py").replace("/", "."), str(path))
        self.index = index

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname):
        tree, mutations = find_mutations(Path(self.path).read_text(encoding="utf-8"))
        mutations[self.index].apply()
        return compile(tree, self.path, "exec", dont_inherit=True)


class Selection:
    """Pytest plugin that keeps the selected tests, in their order, and reports failures."""

    def __init__(self, selected, report):
        self.rank = {test: i for i, test in enumerate(selected)}
        self.report = report

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(kept, key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.report({"failed": report.nodeid})

    def pytest_collectreport(self, report):
        if report.failed:
            self.report({"failed": report.nodeid})


class Recording:
    """Pytest plugin that records each test's duration and the lines of a module it executes."""

    def __init__(self, module):
        self.path = str(PACKAGE / module)
        self.seconds, self.lines = Counter(), defaultdict(set)
        self.lines_now = set()  # those executed by imports are not needed

    def start(self):
        sys.settrace(self._trace)

    def _trace(self, frame, event, argument):
        return self._trace_line if frame.f_code.co_filename == self.path else None

    def _trace_line(self, frame, event, argument):
        self.lines_now.add(frame.f_lineno)
        return self._trace_line

    def pytest_runtest_setup(self, item):
        # A fixture may be shared by the tests of a file, so its lines count for all of them.
        self.lines_now = self.lines[item.nodeid.partition("::")[0]]

    def pytest_runtest_call(self, item):
        self.lines_now = self.lines[item.nodeid]
        self.start()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def result(self):
        """Return the lines and seconds of each test, those of quick files first."""
        files = Counter()
        for test, seconds in self.seconds.items():
            files[test.partition("::")[0]] += seconds
        files_of = {test: test.partition("::")[0] for test in self.seconds}
        tests = sorted(files_of, key=lambda t: (files[files_of[t]], files_of[t], self.seconds[t]))
        return {
            test: {
                "seconds": self.seconds[test],
                "lines": sorted(self.lines[test] | self.lines[files_of[test]]),
            }
            for test in tests
        }


def run_pytest(files, plugin, report):
    """Run the unmarked tests of files one file after another; return the first bad exit code."""
    import pytest
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)  # shrinking a failing example would take time
    settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    settings.load_profile("mutants")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "hypothesispytest", "-m", "not slow"]
    options += ["-o", "addopts=", "--strict-markers", "--rootdir", str(TESTS.parent)]
    for file in files:
        code = pytest.main([*options, str(TESTS.parent / file)], plugins=[plugin])
        if code:
            return int(code)
    return 0


def in_child(work, *, limit):
    """Run `work(report)` in a forked process; return (exit code or None, reported values)."""
    read_end, write_end = os.pipe()
    folder = tempfile.mkdtemp(prefix="mutant-")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setsid()
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = work(lambda value: os.write(write_end, (json.dumps(value) + "\n").encode()))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write_end)
    text, deadline, code = b"", time.monotonic() + limit, None
    # The pipe ends when the child and all that it started have ended.
    while select.select([read_end], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (part := os.read(read_end, 2**16)):
            break
        text += part
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if time.monotonic() < deadline:
        code = os.waitstatus_to_exitcode(status)
    os.close(read_end)
    values = [json.loads(line) for line in text.splitlines()]
    log = (Path(folder) / "log").read_text(errors="replace")
    shutil.rmtree(folder, ignore_errors=True)
    return code, values, log


def record(module):
    """Run the unmutated tests of a module twice; return the lines and seconds of each test."""
    files = [f"tests/{name}" for name in SETTINGS["tests"][module]]

    def first(report):
        recording = Recording(module)
        recording.start()
        code = run_pytest(files, recording, report)
        sys.settrace(None)
        libraries = [
            name
            for name, imported in sys.modules.items()
            if "site-packages" in (getattr(imported, "__file__", None) or "")
        ]
        report({"tests": recording.result(), "libraries": libraries})
        return code

    code, values, log = in_child(first, limit=1800)
    if code:
        sys.exit(f"{log}\nThe unmutated tests of {module} fail; mend them first.")
    tests = values[-1]["tests"]
    for name in values[-1]["libraries"]:
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    # Again, in the order in which mutants are judged, and without the trace, which takes time.
    outcome = judge(module, None, list(tests), limit=1800)
    if outcome["outcome"] != "survived":
        sys.exit(f"The unmutated tests of {module} fail in another order: {outcome}")
    return tests


def judge(module, index, tests, *, limit):
    """Run tests on one mutant, or on the unchanged module (None); return its outcome."""

    def work(report):
        if index is not None:
            sys.meta_path.insert(0, MutatedModule(module, index))
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return run_pytest(files, Selection(tests, report), report)

    start = time.monotonic()
    code, values, log = in_child(work, limit=limit) if tests else (0, [], "")
    if code in NO_TESTS_RUN:
        sys.exit(f"{log}\nNo tests ran for {module}.")
    outcome = {0: "survived", None: "noticed: time limit", 1: "noticed"}.get(code)
    return {
        "outcome": outcome or f"noticed: exit code {code}",
        "by": next((value["failed"] for value in values if "failed" in value), None),
        "tests": len(tests),
        "seconds": round(time.monotonic() - start, 1),
    }


def run_module(module, results, file, *, survivors_only):
    """Judge the mutants of a module that have no result; append the results to a file."""
    wanted, equivalents = [], equivalents_of(module)
    for index, mutation in enumerate(mutations_of(module)):
        known = results.get((module, mutation.key), {}).get("outcome")
        is_survivor = known == "survived" and mutation.key not in equivalents
        if is_survivor if survivors_only else known is None:
            wanted.append((index, mutation))
    if not wanted:
        return
    print(f"{module}: recording its tests", flush=True)
    for name in (None, *SETTINGS["tests"][module]):
        digest(module, name)  # of what is judged now, although files may be edited meanwhile
    tests = record(module)
    for index, mutation in wanted:
        lines = set(mutation.lines)
        selected = [t for t in tests if not lines or lines.intersection(tests[t]["lines"])]
        if survivors_only:  # those that execute the line first
            selected = [*dict.fromkeys([*selected, *tests])]
        limit = 30 + 5 * sum(tests[test]["seconds"] for test in selected)
        result = judge(module, index, selected, limit=limit)
        names = {"module": module, "key": mutation.key, "change": mutation.change}
        result = {**names, **result, "files": digest(module, file_of(result["by"]))}
        results[module, mutation.key] = result
        file.write(json.dumps(result) + "\n")
        file.flush()
        if result["outcome"] == "survived":
            print(f"  survived: {mutation.line}\n            {mutation.change}", flush=True)


def summarize(modules, results):
    """Print a row per module; return whether each mutant has the result that is expected of it."""
    print(f"\n{'module':28} mutants noticed equivalent survived not run  score")
    totals, wrong = Counter(), []
    for module in modules:
        counts, equivalents = Counter(), equivalents_of(module)
        for mutation in mutations_of(module):
            outcome = results.get((module, mutation.key), {}).get("outcome", "not run")
            kind, is_listed = outcome.partition(":")[0], mutation.key in equivalents
            counts["equivalent" if is_listed and kind == "survived" else kind] += 1
            wrong += [f"{module}: {mutation.key}"] if is_listed and kind == "noticed" else []
        print(_row(module, counts))
        totals += counts
    print(_row("all", totals))
    if wrong:
        print("Listed as equivalent, but noticed:", *wrong, sep="\n  ")
    return not wrong and not totals["survived"]


def _row(name, counts):
    judged = counts["noticed"] + counts["survived"]
    score = f"{counts['noticed'] / judged:7.1%}" if judged else "      -"
    columns = (counts[kind] for kind in ("noticed", "equivalent", "survived", "not run"))
    return "{:28}{:8}{:8}{:11}{:9}{:8}".format(name, counts.total(), *columns) + score


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="MODULE", help="regular expression of modules")
    parser.add_argument("--survivors", action="store_true", help="rerun the survivors")
    parser.add_argument("--summary", action="store_true", help="only print the summary")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"), metavar="FILE")
    options = parser.parse_args()
    modules = [m for m in SETTINGS["tests"] if re.search(options.only or "", m)]
    if not modules:
        parser.error(f"--only {options.only}: no such module in mutants.toml")
    try:
        check_equivalents()
    except ValueError as error:
        sys.exit(str(error))
    results = read_results(options.results)
    if not options.summary:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        sys.path.insert(0, str(TESTS.parent))
        for name in PRELOADED:
            importlib.import_module(name)
        with options.results.open("a") as file:
            for module in modules:
                run_module(module, results, file, survivors_only=options.survivors)
    sys.exit(not summarize(modules, results))


if __name__ == "__main__":
    main()
