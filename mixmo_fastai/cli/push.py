"""`mixmo push`: write a run in the layout of the Hugging Face Hub."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.decision_options import RawLogits
from mixmo_fastai.cli.render import align
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.folder import open_run


def push(
    run: Annotated[Path, typer.Argument(help="A run folder of `mixmo fit`.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            help="A new folder, or hf:USER/NAME for a repository of the Hub.",
            metavar="FOLDER|hf:REPO",
            rich_help_panel=opt.OUTPUT,
        ),
    ],
    license_id: Annotated[
        str,
        typer.Option(
            "--license", help="Licence of the weights, such as mit.", rich_help_panel=opt.OUTPUT
        ),
    ] = "unknown",
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Make a new repository private.", rich_help_panel=opt.OUTPUT
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the network of an existing repository.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    raw: RawLogits = False,
    data_dir: opt.DataDir = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write one plain network with a model card, in the layout of the Hugging Face Hub.

    `mixmo predict` reads the result, from the folder or as hf:USER/NAME.
    """
    folder = open_run(run)
    if find_spec("huggingface_hub") is None:
        raise InputError(
            "`mixmo push` needs huggingface_hub.\nInstall: pip install 'mixmo-fastai[hub]'"
        )
    for flag, is_given in (("--private", private), ("--overwrite", overwrite)):
        if is_given and not to.startswith("hf:"):
            raise InputError(f"{flag} is for a repository, such as hf:USER/NAME; got {to!r}.")

    from mixmo_fastai.export.hub import push_run

    settings = {"private": private, "overwrite": overwrite, "raw": raw}
    result = push_run(folder, to, data_dir, license_id=license_id, **settings)
    rows = [
        ("Network", f"{result['arch']}, {result['parameters']:,} parameters"),
        ("Written", f"{result['to']}: config.json, model.safetensors, README.md"),
    ]
    Output(as_json=as_json).print_result(align(rows), {"run": str(folder.path), **result})
