"""`mixmo datasets`: list the data sets, their folder, and whether they are present and intact."""

import dataclasses

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.config.choices import DATASETS


def datasets(
    data_dir: opt.DataDir = None, as_json: opt.Json = False, debug: opt.Debug = False
) -> None:
    """List the data sets, and verify the checksums of those that are present."""
    from mixmo_fastai.data.sources import data_home, dataset_status

    output = Output(as_json=as_json)
    statuses = [dataset_status(name, data_dir) for name in DATASETS]
    lines = [f"Data folder: {data_home(data_dir)}; sizes as published", ""]
    for status in statuses:
        info = DATASETS[status.name]
        train, test = info.num_images
        shape = "x".join(map(str, info.image_shape))
        lines.append(
            f"{status.name:<13} {status.state:<8} {train:>7,} + {test:>6,} images of {shape:<7} "
            f"{info.num_classes:>4} classes  {status.detail}"
        )
    lines += [
        "",
        "Also usable: a folder of images with one folder per class, or with such folders in "
        "train/, valid/ and test/; a table of labels (CSV, TSV, parquet); hf:NAME.",
    ]
    value = {
        s.name: {**dataclasses.asdict(s), "place": str(s.place) if s.place else None}
        for s in statuses
    }
    output.print_result(lines, value)
