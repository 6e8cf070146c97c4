"""Flags about calibrated probabilities, prediction sets and accepted predictions."""

from typing import Annotated

import typer

from mixmo_fastai.cli.options import DECISIONS

RawProbabilities = Annotated[
    bool, typer.Option("--raw", help="Print probabilities without calibration.")
]
RawLogits = Annotated[bool, typer.Option("--raw", help="Write the logits without calibration.")]
Coverage = Annotated[
    float | None,
    typer.Option(
        help="Print a set of classes that contains the label with this probability.",
        rich_help_panel=DECISIONS,
    ),
]
SetScore = Annotated[
    str | None,
    typer.Option(
        help="Score of the sets: lac, aps or raps. Default: raps, or lac for two classes.",
        rich_help_panel=DECISIONS,
    ),
]
PerClass = Annotated[
    bool,
    typer.Option(
        "--per-class",
        help="The coverage holds for each class separately.",
        rich_help_panel=DECISIONS,
    ),
]
MaxRisk = Annotated[
    float | None,
    typer.Option(
        help="Accept predictions so that at most this fraction of them is wrong; ask about the "
        "others.",
        rich_help_panel=DECISIONS,
    ),
]
RiskScore = Annotated[
    str | None,
    typer.Option(
        help="Score of accepted predictions: confidence (the default), entropy, max-logit, energy "
        "or mutual-information.",
        rich_help_panel=DECISIONS,
    ),
]
OodThreshold = Annotated[
    float | None,
    typer.Option(
        help="Mark images as unfamiliar so that at least this fraction of images like those of "
        "training is not marked.",
        rich_help_panel=DECISIONS,
    ),
]
OodScore = Annotated[
    str | None,
    typer.Option(
        help="Score of unfamiliar images: energy (the default), max-logit, confidence, entropy or "
        "mutual-information.",
        rich_help_panel=DECISIONS,
    ),
]
EvaluatedCoverage = Annotated[
    float,
    typer.Option(help="Coverage of the prediction sets to evaluate.", rich_help_panel=DECISIONS),
]
EvaluatedRisk = Annotated[
    float,
    typer.Option(help="Risk of the accepted predictions to evaluate.", rich_help_panel=DECISIONS),
]
