"""Whether data is the same as before: names, sizes and labels of all images."""

import hashlib

from mixmo_fastai.data.image_sets import DataSource, ImageSet


def fingerprint(source: DataSource) -> dict[str, str]:
    """Tell two states of a data set apart.

    Returns:
        for each part, and for the classes, how many there are and the start of a checksum.
    """
    classes = _digest("\0".join(source.classes))
    parts = {"train": source.train, "valid": source.valid, "test": source.test}
    return {
        "classes": f"{len(source.classes)} classes, checksum {classes}",
        **{name: _of_part(images) for name, images in parts.items() if images is not None},
    }


def _of_part(images: ImageSet) -> str:
    entries = zip(range(len(images)), images.labels.tolist(), images.sizes(), strict=True)
    lines = (f"{images.name(index)}\0{label}\0{size}" for index, label, size in entries)
    shape = "x".join(map(str, images.image_shape))
    digest = _digest("\n".join([shape, *lines]))
    return f"{len(images)} images of {shape}, checksum {digest}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
