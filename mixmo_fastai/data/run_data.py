"""The data set of a recipe, with the split and the skipped images of its run."""

import json
import os
from dataclasses import replace
from pathlib import Path

from mixmo_fastai.config.choices import DATASETS, HUB_PREFIX, is_table
from mixmo_fastai.config.defaults import is_pretrained
from mixmo_fastai.config.recipe import Data, Recipe
from mixmo_fastai.data.chosen_images import moved_advice
from mixmo_fastai.data.fingerprint import fingerprint
from mixmo_fastai.data.image_sets import DataSource
from mixmo_fastai.data.parts import DataParts, parts_before_split_json
from mixmo_fastai.data.sources import load_source
from mixmo_fastai.data.table_columns import columns_of
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder


def facts_of(source: DataSource) -> DataFacts:
    """Return the facts about a data set that prediction needs."""
    return DataFacts(
        source.classes,
        source.mean,
        source.std,
        source.train.image_shape,
        is_multi_label=source.is_multi_label,
    )


def read_source(
    recipe: Recipe,
    data_dir: Path | None,
    run: RunFolder | None = None,
    *,
    largest_side: int | None = None,
) -> DataSource:
    """Load the data set of a recipe.

    Args:
        recipe: the recipe.
        data_dir: see `load_source`.
        run: the run whose images are loaded again, at the size and with the mean and standard
            deviation that it recorded; None for a new run.
        largest_side: see `load_source`.
    """
    left_out, parts, facts = None, None, None
    if run is not None:
        _check_table(recipe.data)
        facts = run.data_facts()
        # None: the run was to skip damaged images, but has not searched for them yet.
        default = None if recipe.data.skip_damaged else {}
        left_out = default if (recorded := run.left_out()) is None else recorded
        parts = data_parts(run)
    is_named = recipe.data.dataset in DATASETS
    source = load_source(
        recipe.data.dataset,
        data_dir,
        columns=columns_of(recipe.data),
        image_size=recipe.data.image_size or None,
        chosen_size=None if facts is None or is_named else facts.image_shape[1:],
        largest_side=largest_side,
        test_split=recipe.data.test_split,
        parts=parts,
        classes=None if facts is None or parts is None else facts.classes,
        skip_damaged=recipe.data.skip_damaged,
        left_out=left_out,
    )
    return source if run is None else with_recorded_statistics(source, run)


def _check_table(data: Data) -> None:
    """Raise InputError if the table of a run, or the folder of its images, is missing."""
    if not is_table(data.dataset) or data.dataset.startswith(HUB_PREFIX):
        return
    path = Path(os.path.expanduser(data.dataset))
    if not path.is_file():
        advice = moved_advice("data.dataset")
        raise InputError(f"There is no table {data.dataset!r}.\n{advice}")
    folder = path.parent / os.path.expanduser(data.image_folder)
    if not folder.is_dir():
        advice = moved_advice("data.image_folder")
        raise InputError(f"There is no folder {str(folder)!r}.\n{advice}")


def with_recorded_statistics(source: DataSource, run: RunFolder) -> DataSource:
    """Return a data set with the mean and standard deviation that a run was trained with.

    Those of a pretrained network belong to its weights, and a folder may have other training
    images by now. Named data sets do not change.
    """
    facts, recipe = run.data_facts(), run.recipe()
    if facts is None or len(facts.mean) != len(source.mean):
        return source
    if recipe.data.dataset in DATASETS and not is_pretrained(recipe):
        return source
    return replace(source, mean=facts.mean, std=facts.std)


def data_parts(run: RunFolder) -> DataParts | None:
    """Read the data split of a run on an image folder.

    Returns:
        None for named data sets and for runs that never started.
    """
    dataset = run.recipe().data.dataset
    if dataset in DATASETS:
        return None
    if (split := run.split()) is not None:
        return DataParts.from_mapping(split, run.path / "split.json")
    has_begun = run.data_facts() is not None
    return parts_before_split_json(Path(dataset)) if has_begun else None


def changed_images(run: RunFolder, source: DataSource) -> set[str]:
    """Return which images differ from those of the run: names of "train", "valid" and "test".

    Without a checkpoint, which alone holds their fingerprints, the set is empty.
    """
    try:
        saved = CheckpointStore(run.networks()[0].checkpoint).newest()
        prints = json.loads((saved.path / "state.json").read_bytes())["data"] if saved else {}
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return set()
    found = fingerprint(source)
    names = {"train", "valid", "test"} & prints.keys()
    return {name for name in names if prints[name] != found.get(name)}
