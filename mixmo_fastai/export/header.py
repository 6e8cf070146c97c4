"""The header of exported files: what their metadata hold as JSON under "mixmo"; see `files`."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mixmo_fastai.errors import InputError
from mixmo_fastai.export.formats import Metadata
from mixmo_fastai.export.thresholds import ExportedCalibration
from mixmo_fastai.metrics.multi_label import LabelDecisions
from mixmo_fastai.runs.data_facts import DataFacts

FORMAT = "mixmo-fused-1"


def metadata_of(
    arch: str,
    facts: DataFacts,
    calibration: dict[str, Any] | None,
    labels: LabelDecisions | None = None,
) -> Metadata:
    """Return the metadata of a file, with the header."""
    header = {
        "format": FORMAT,
        "arch": arch,
        "data": dataclasses.asdict(facts),
        "calibration": calibration,
        **({} if labels is None else {"labels": dataclasses.asdict(labels)}),
    }
    return {"mixmo": json.dumps(header)}


@contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Replace the errors that invalid content causes by an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}.") from error


def read_header(path: Path, metadata: Metadata) -> dict[str, Any]:
    """Read the header from the metadata of a file."""
    if "mixmo" not in metadata:
        raise InputError(
            f"{path} is not an exported network.\n"
            f"Create one with: mixmo export RUN --to FILE{path.suffix.lower()}"
        )
    with damage_explained(path):
        header: dict[str, Any] = json.loads(metadata["mixmo"])
        if header["format"] != FORMAT:
            raise InputError(
                f"{path} has format {header['format']!r}; this version reads {FORMAT}."
            )
    return header


def parts_of_header(
    path: Path, header: dict[str, Any]
) -> tuple[str, DataFacts, ExportedCalibration | None, LabelDecisions | None]:
    """Return architecture, facts, calibration, and decisions about several labels per image."""
    with damage_explained(path):
        facts, entry = DataFacts.from_mapping(header["data"]), header.get("calibration")
        num_classes, labels = len(facts.classes), None
        calibration = None if entry is None else ExportedCalibration(entry, num_classes)
        if facts.is_multi_label:
            labels = LabelDecisions.from_mapping(header["labels"], num_classes)
        return str(header["arch"]), facts, calibration, labels


def facts_of_exported(path: Path) -> DataFacts | None:
    """Read the facts about the data from the header of an exported .safetensors file, if it is one.

    Raises:
        InputError: the header is damaged.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):  # the reader of the weights reports it
        return None
    if "mixmo" not in metadata:
        return None
    return parts_of_header(path, read_header(path, metadata))[1]
