"""`mixmo datasets`: what there is, where it is looked for, whether it is intact."""

import dataclasses

from mixmo_fastai.cli import options as opt
from mixmo_fastai.cli.console import Output
from mixmo_fastai.names import DATASETS


def datasets(
    data_dir: opt.DataDir = None, as_json: opt.Json = False, debug: opt.Debug = False
) -> None:
    """List the data sets, and check those that are there against their checksums."""
    from mixmo_fastai.data.sources import data_home, dataset_status

    output = Output(as_json=as_json)
    statuses = [dataset_status(name, data_dir) for name in DATASETS]
    lines = [f"Data folder: {data_home(data_dir)}; sizes are as published", ""]
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
        "Any folder of images is a data set as well: one folder per class, or train/, valid/ and "
        "test/ that hold them.",
    ]
    value = {
        s.name: {**dataclasses.asdict(s), "place": str(s.place) if s.place else None}
        for s in statuses
    }
    output.result(lines, value)
