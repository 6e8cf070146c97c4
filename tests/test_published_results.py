"""The figures of docs/results.md and of other pages are those of the files in studies/."""

import json
import re
import runpy
import statistics
from pathlib import Path

import pytest

from mixmo_fastai.config.load import load_recipe
from mixmo_fastai.study.plan import read_study
from mixmo_fastai.study.results import collect_results

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "small_cifar10": {
        "vanilla": "Vanilla",
        "mixup": "mixup",
        "cutmix": "CutMix",
        "ensemble-cutmix": "Two networks with CutMix",
        "ensemble-mixup": "Two networks with mixup",
        "mimo": "MIMO",
        "linear-mixmo": "Linear-MixMo",
        "cut-mixmo": "Cut-MixMo",
        "cut-mixmo-early": "Cut-MixMo, `early_repetition=1`",
        "cut-mixmo-cutmix": "Cut-MixMo + CutMix",
        "cut-mixmo-mixup": "Cut-MixMo + mixup",
    },
    "small_cifar10_sooner": {
        "vanilla": "Vanilla",
        "cutmix": "CutMix",
        "cut-mixmo": "Cut-MixMo",
        "linear-02": "`early_repetition=1`, linear to 20 % of training",
        "linear-04": "`early_repetition=1`, linear to 40 %",
        "linear-06": "`early_repetition=1`, linear to 60 %",
        "step-04": "`early_repetition=1`, step at 40 %",
        "linear-06-lr-01": "`early_repetition=1`, linear to 60 %, peak rate 0.1",
        "lr-01": "peak rate 0.1",
        "b2": "`batch_repetitions=2`",
        "b2-linear-06": "both: `batch_repetitions=2`, and linear to 60 %",
        "b2-step-06": "`batch_repetitions=2`, and step at 60 %",
        "b2-linear-08": "`batch_repetitions=2`, and linear to 80 %",
        "b1-linear-06": "`batch_repetitions=1`, and linear to 60 %",
        "muon": "Muon, peak rate 0.02",
        "ema": "`ema_decay=0.999`",
        "members-3": "`num_members=3`",
        "always-mixed": "`mix_prob=1`",
    },
    "small_cifar10_wider": {
        "mixup": "mixup",
        "cut-mixmo-short-mixup": "`cut-mixmo-short` + mixup",
    },
    "small_cifar10_short": {
        "cutmix": "CutMix",
        "ensemble-cutmix": "Two networks with CutMix",
        "mixup": "mixup",
        "cut-mixmo-short": "`cut-mixmo-short`",
        "cut-mixmo-short-mixup": "`cut-mixmo-short` + mixup",
    },
    "small_cifar10_sizes": {
        f"{size}-{method}": f"{size:,} | {shown}"
        for size in (1000, 5000)
        for method, shown in {
            "cutmix": "CutMix",
            "mixup": "mixup",
            "cut-mixmo-short": "`cut-mixmo-short`",
            "cut-mixmo-short-mixup": "`cut-mixmo-short` + mixup",
        }.items()
    },
    "small_cifar10_5000": {
        "cutmix": "CutMix",
        "mixup": "mixup",
        "cut-mixmo": "Cut-MixMo",
        "cut-mixmo-short": "`cut-mixmo-short`",
        "cut-mixmo-short-mixup": "`cut-mixmo-short` + mixup",
    },
    "cifar10_10000": {
        "cutmix": "CutMix",
        "mixup": "mixup",
        "cut-mixmo": "Cut-MixMo",
        "cut-mixmo-short": "`cut-mixmo-short`",
        "cut-mixmo-short-mixup": "`cut-mixmo-short` + mixup",
    },
    "fine_tune": {
        "vanilla": "Vanilla",
        "cutmix": "CutMix",
        "ensemble-cutmix": "Two networks with CutMix",
        "cut-mixmo": "Cut-MixMo",
        "cut-mixmo-similar": "`perturbation=0.1`",
        "cut-mixmo-once": "`perturbation=0.1`, `batch_repetitions=1`",
        "cut-mixmo-late": "`perturbation=0.1`, `batch_repetitions=1`, `early_span=0.9`",
        "cut-mixmo-published": "`perturbation=0.1`, `batch_repetitions=4`, no early repetition",
        "cut-mixmo-apart": "`perturbation=0.1`, no early repetition",
    },
}
"""Names of the methods in docs/results.md, by the study in examples/."""
COMPARED = {
    "small_cifar10_short": {"cutmix", "cut-mixmo-short"},
    "small_cifar10_sizes": {
        f"{size}-{method}"
        for size in (1000, 5000)
        for method in ("cutmix", "mixup", "cut-mixmo-short", "cut-mixmo-short-mixup")
    },
    "small_cifar10_5000": {"cutmix", "cut-mixmo-short"},
    "small_cifar10_wider": {"mixup", "cut-mixmo-short-mixup"},
    "cifar10_10000": {"cutmix", "mixup", "cut-mixmo-short"},
}
"""Methods that a study must have; CutMix and Cut-MixMo unless it is named here."""
PAGES_WITH_RESULTS = ("README.md", "docs/when.md", "examples/learner_to_mixmo.ipynb")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_are_recomputed_from_the_repository(name):
    """The rows of docs/results.md are those of the files in studies/."""
    study = read_study(ROOT / "examples" / f"{name}.toml", "cifar10-images", must_exist=False)
    cells = collect_results(study, ROOT / "studies" / name.replace("_", "-"))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    command = f"`mixmo study examples/{name}.toml"
    section = text.partition(command)[2].partition("\n#")[0]
    compared = COMPARED.get(name, {"cutmix", "cut-mixmo"})
    assert compared <= {cell.method for cell in cells}
    with_length = len({cell.images_seen for cell in cells}) > 1
    for cell in cells:
        seeds = ", ".join(map(str, cell.seeds))
        length = f"{cell.images_seen:,} | " * with_length
        start = f"| {length}{PUBLISHED[name][cell.method]} | {seeds} |"
        (row,) = [line for line in section.splitlines() if line.startswith(start)]
        for part in (
            f"{100 * cell.mean('accuracy'):.2f} %",
            f"{cell.mean('nll'):.3f}",
            f"{cell.mean('nll_calibrated'):.3f}",
            f"{100 * cell.mean('ece'):.2f} %",
        ):
            assert part in row, cell.method


def test_published_results_of_a_learner_are_those_of_the_files():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = text.partition("### The rates of a Learner\n")[2].partition("\n#")[0]
    found = []
    for file in (ROOT / "studies" / "learner").glob("*.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        size = run["perturbation"]
        method = run["method"] + ("" if size is None else f", `perturbation={size:g}`")
        epochs, rate, divisor = run["fine_tune"]
        training = f"`fine_tune({epochs}, {rate:g}, lr_mult={divisor:g})`"
        nlls = (f"{run[name]:.3f}" for name in ("nll", "nll_calibrated"))
        results = f"{100 * run['accuracy']:.2f} %", *nlls
        found.append(f"| {' | '.join([method, run['head'], training, *results])} |")
    rows = [line for line in section.splitlines() if "`fine_tune(" in line and line[0] == "|"]
    assert sorted(found) == sorted(row.replace("**", "") for row in rows)
    assert len(found) >= 4


def test_pages_show_the_published_results():
    """README, the page about when it pays and the notebook have the figures of docs/results.md."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES_WITH_RESULTS]
    picture = runpy.run_path(str(ROOT / "docs/images/when.py"))
    for method in picture["METHODS"]:
        runs = picture["read_runs"](method)
        accuracy = statistics.fmean(picture["accuracies"](runs))
        for page, text in zip(PAGES_WITH_RESULTS, texts, strict=True):
            # Only a plain network is missing on the page that compares with CutMix.
            if (page, method) != ("docs/when.md", "vanilla"):
                assert re.search(rf"{accuracy:.1f}\b|{accuracy:.2f}\b", text), (page, method)
        recipe = load_recipe(f"small-cifar10/{method.replace('ensemble', 'deep-ensemble')}")
        assert f"{100 * recipe.expected.accuracy:.2f}" == f"{accuracy:.2f}", method
        nll = statistics.fmean(picture["calibrated_nlls"](runs))
        row = rf"\| \**{accuracy:.2f} %\** \| \**{nll:.3f}\** \| {runs[0]['parameters']:,} \|"
        assert re.search(row, texts[-1]), method
