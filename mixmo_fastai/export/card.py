"""The model card of a run: results, data, training, calibration and limits, from its own files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mixmo_fastai.config.choices import DATASETS, HUB_PREFIX
from mixmo_fastai.config.methods import method_name
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.config.schema import to_toml
from mixmo_fastai.metrics.conformal import default_score
from mixmo_fastai.metrics.label_results import (
    LABELS,
    NUM_SHOWN,
    in_use,
    label_table,
    label_table_note,
    origin_in_use,
)
from mixmo_fastai.metrics.table import percent
from mixmo_fastai.runs.calibration import read_calibration
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}
"""Names of data sets on the Hub."""
MAX_CLASSES = 20
"""Number of class names in the card; config.json has all."""
_SPLITS = {"test": "test", "valid": "validation"}


def model_card(
    run: RunFolder, address: str, facts: DataFacts, *, license_id: str, is_calibrated: bool
) -> str:
    """Write the card of a finished run, as Markdown with metadata.

    Args:
        run: the run.
        address: what `load_fused` reads: a folder, or "hf:USER/NAME".
        facts: of the fused network.
        license_id: licence of the weights.
        is_calibrated: whether the logits contain the calibration of the run, if it has one.
    """
    recipe, metrics = run.recipe(), run.metrics()
    split = "test" if "test" in metrics else "valid"
    dataset = recipe.data.dataset if recipe.data.dataset in DATASETS else _name(recipe)
    name = address.removeprefix(HUB_PREFIX)
    contains = is_calibrated and has_calibration(run) and "calibrated" in metrics
    metadata = _metadata(name, dataset, recipe, metrics, license_id, is_calibrated=contains)
    parts = [
        f"---\n{metadata}\n---",
        f"# {name}",
        _summary(recipe, facts, metrics, dataset),
        "## Results",
        *_results(metrics, split),
        "## Use",
        _usage(address, is_multi_label=facts.is_multi_label),
        "## Data",
        _data(facts, dataset),
        "## Probabilities",
        *_probabilities(run, metrics, split, is_calibrated=is_calibrated),
        "## Limits",
        _limits(metrics, split, recipe),
        "## Training",
        _training(recipe, metrics),
    ]
    return "\n\n".join(parts) + "\n"


def has_calibration(run: RunFolder) -> bool:
    """Check whether a run has a temperature that its exported logits contain."""
    if labels := run.metrics().get(LABELS):
        return bool(in_use(labels)["temperature"] != 1)
    calibration = read_calibration(run)
    scaling = None if calibration is None else calibration.scaling
    return scaling is not None and scaling.method == "temperature"


def _name(recipe: Recipe) -> str:
    return Path(recipe.data.dataset).name


def _metadata(
    name: str,
    dataset: str,
    recipe: Recipe,
    metrics: Mapping[str, Any],
    license_id: str,
    *,
    is_calibrated: bool,
) -> str:
    """Return the metadata in YAML."""
    final = metrics["test" if "test" in metrics else "valid"]
    values = {**final, **metrics.get(LABELS, {})}
    if is_calibrated:  # accuracy and mAP do not change
        values |= {name: metrics["calibrated"][name] for name in ("nll", "ece")}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=HUB_DATASETS.get(dataset, dataset),
            dataset_name=dataset,
            metric_type=metric,
            metric_value=round(float(values[metric]), 6),
        )
        for metric in ("mean_ap", "accuracy", "nll", "ece")
        if metric in values
    ]
    data = ModelCardData(
        license=license_id,
        library_name="mixmo-fastai",
        pipeline_tag="image-classification",
        tags=["mixmo", "ensemble", "uncertainty"] if recipe.model.num_members > 1 else [],
        datasets=[HUB_DATASETS[dataset]] if dataset in HUB_DATASETS else None,
        metrics=["mean_ap" if LABELS in metrics else "accuracy"],
        model_name=name,
        eval_results=results,
    )
    return str(data.to_yaml()).strip()


def _summary(recipe: Recipe, facts: DataFacts, metrics: Mapping[str, Any], dataset: str) -> str:
    members = recipe.model.num_members
    network = f"{recipe.model.arch}, {method_name(recipe)}, trained on {dataset}."
    kind = f"A classifier of {len(facts.classes)} classes"
    if facts.is_multi_label:
        kind = f"It predicts which of {len(facts.classes)} labels an image has"
    if members == 1:
        return f"{network} {kind}."
    return (
        f"{network} {kind}: an ensemble of {members} members "
        "trained in one network ([MixMo](https://arxiv.org/abs/2103.06132)), fused into one plain "
        "network with the logits of the ensemble and the cost of a single prediction."
    )


def _results(metrics: Mapping[str, Any], split: str) -> list[str]:
    final, intervals = metrics[split], metrics.get("intervals", {})
    rows = [("metric", "value", "95 % interval"), ("---", "---", "---")]
    if labels := metrics.get(LABELS):
        final = {**final, **labels}
        intervals = {**intervals, "mean_ap": labels.get("mean_ap_interval", ())}
    for key, label, text in (
        ("mean_ap", "mAP", percent),
        ("f1_micro", "F1, micro", _number),
        ("f1_macro", "F1, macro", _number),
        ("accuracy", "accuracy of the labels" if labels else "accuracy", percent),
        ("nll", "NLL", _number),
        ("brier", "Brier score", _number),
        ("ece", "ECE", percent),
    ):
        if key in final:
            ends = " to ".join(map(text, intervals.get(key, ())))
            rows.append((label, text(final[key]), ends))
    if len(members := final["member_accuracy"]) > 1:
        rows.append(("accuracy of the members", ", ".join(map(percent, members)), ""))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    source = (
        f"On the {_SPLITS[split]} images, before calibration; intervals by bootstrap over images."
    )
    if split == "valid":
        source += (
            " There was no test set, and the validation images may have been used for choices."
        )
    if labels:
        source += (
            " Each label of each image is a decision, for which NLL, Brier score and ECE hold."
        )
        return [source, table, *_label_table(labels)]
    return [source, table]


def _label_table(values: Mapping[str, Any]) -> list[str]:
    """Return the table of labels as Markdown, with at most `NUM_SHOWN` rows."""
    head, *rows = label_table(values)
    lines = [head, ("---",) * len(head), *rows[:NUM_SHOWN]]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
    note = label_table_note(values).replace("metrics.json and the report", "the run")
    return [table, *([note] if note else [])]


def _number(value: float) -> str:
    return f"{value:.4f}"


def _usage(address: str, *, is_multi_label: bool) -> str:
    flags = "" if is_multi_label else " --coverage 0.9 --max-risk 0.05"
    name = address.removeprefix(HUB_PREFIX)
    return f"""```python
from mixmo_fastai.export.files import load_fused

network = load_fused("{address}")  # network.model is a plain torch module
```

    mixmo predict {address} IMAGES{flags}

With the library of the Hub:
`mixmo_fastai.export.hub.FusedClassifier.from_pretrained("{name}")`. Input: images scaled to cover
the size below, cut at the centre, `(pixels / 255 - mean) / std` with the values of
`config.json`. Output: logits."""


def _data(facts: DataFacts, dataset: str) -> str:
    channels, height, width = facts.image_shape
    shown = ", ".join(facts.classes[:MAX_CLASSES])
    more = ", …" if len(facts.classes) > MAX_CLASSES else ""
    return (
        f"{dataset}: images of {height}x{width} pixels with {channels} "
        f"channel{'s' * (channels > 1)}. Classes: {shown}{more}."
    )


def _probabilities(
    run: RunFolder, metrics: Mapping[str, Any], split: str, *, is_calibrated: bool
) -> list[str]:
    """Describe calibration, prediction sets and abstention, as far as they were measured.

    The figures are those of metrics.json, and are left out if the run was calibrated again since.
    """
    if LABELS in metrics:
        return [_label_probabilities(metrics[LABELS], is_calibrated=is_calibrated)]
    calibration = read_calibration(run)
    if calibration is None:
        return ["Not calibrated: the run has no calibration images."]
    sets, abstention = metrics.get("sets", {}), metrics.get("abstention", {})
    score = default_score(calibration.num_classes)
    coverage, found = sets.get("requested_coverage"), sets.get(score, {})
    if calibration.scaling is None:
        lines = [f"Not calibrated: {calibration.reason}."]
    else:
        where = "The logits contain" if is_calibrated else "The logits do not contain"
        before, after = (calibration.effect[name] for name in ("before", "after"))
        lines = [
            f"{where} the {calibration.scaling.method} scaling fitted on "
            f"{len(calibration.labels):,} images that were not trained on. In cross-validation on "
            f"them, the NLL with it is {_number(after['nll'])} instead of "
            f"{_number(before['nll'])}, the ECE {percent(after['ece'])} instead of "
            f"{percent(before['ece'])}."
        ]
    if "coverage" not in found or [*calibration.sets(coverage).thresholds] != found["thresholds"]:
        return lines  # not measured, or with other thresholds
    low, high = map(percent, found["interval"])
    lines.append(
        f"Prediction sets for {percent(coverage)} contain the label of "
        f"{percent(found['coverage'])} of the {_SPLITS[split]} images ({low} to {high}), with "
        f"{found['mean_size']:.2f} classes on average."
    )
    limit, chosen = percent(abstention["max_risk"]), abstention["confidence"]
    if chosen["risk"] is None:
        return [*lines, f"No threshold guarantees a risk of {limit}."]
    accepted = (
        f"Predictions above the threshold for a risk of {limit}: {percent(chosen['coverage'])} of "
        f"the {_SPLITS[split]} images, of which {percent(chosen['risk'])} are wrong."
    )
    return [*lines, accepted]


def _label_probabilities(values: Mapping[str, Any], *, is_calibrated: bool) -> str:
    """Describe temperature and thresholds of labels."""
    text = f"Labels are predicted {origin_in_use(values)}; `config.json` has the thresholds."
    text = f"The probability of each label is the sigmoid of its logit. {text}"
    temperature = in_use(values)["temperature"]
    if temperature == 1:
        return f"The logits are not calibrated. {text}"
    where = "contain" if is_calibrated else "do not contain"
    return (
        f"The logits {where} the temperature {temperature:.3f}, fitted on images that were not "
        f"trained on. {text}"
    )


def _limits(metrics: Mapping[str, Any], split: str, recipe: Recipe) -> str:
    final, several = metrics[split], LABELS in metrics
    others = "Every image gets one of the classes, also an image of something else."
    if several:
        others = "Labels other than these are never predicted."
    lines = [
        "The results hold for images from the same source as those it was measured on. Other "
        "cameras, other framing and other classes were not measured.",
        others,
        f"It is wrong on {percent(1 - final['accuracy'])} of the "
        f"{'labels' if several else 'images'} measured.",
    ]
    if recipe.data.limit:
        lines.append(f"It was trained on {recipe.data.limit:,} images only.")
    return "\n".join(f"- {line}" for line in lines)


def _training(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    folder = Path(recipe.data.image_folder).name  # a path may name people or machines
    data = replace(recipe.data, dataset=_name(recipe), image_folder=folder)
    shared, epochs = replace(recipe, data=data), metrics["epochs"]
    return (
        f"{epochs} epoch{'s' * (epochs != 1)}, {metrics['images_seen']:,} images seen, "
        f"{metrics['parameters']:,} parameters in training. The recipe:\n\n"
        f"```toml\n{to_toml(shared).strip()}\n```"
    )
