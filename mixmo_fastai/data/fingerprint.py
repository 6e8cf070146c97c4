"""Fingerprint of a data set: checksums of the names, sizes and labels of all images."""

import hashlib

from mixmo_fastai.data.image_sets import DataSource, ImageSet, groups_of


def fingerprint(source: DataSource) -> dict[str, str]:
    """Compute the fingerprint of a data set, to detect changes.

    Returns:
        for the classes and for each split, a text with their number and a short checksum.
    """
    classes = _digest("\0".join(source.classes))
    parts = {"train": source.train, "valid": source.valid, "test": source.test}
    return {
        "classes": f"{len(source.classes)} classes, checksum {classes}",
        **{name: fingerprint_of(images) for name, images in parts.items() if images is not None},
    }


def fingerprint_of(images: ImageSet) -> str:
    """Return the number of images, their shape and the checksum of an image set."""
    entries = zip(range(len(images)), images.labels.tolist(), images.sizes(), strict=True)
    lines = (f"{images.name(index)}\0{label}\0{size}" for index, label, size in entries)
    shape = "x".join(map(str, images.image_shape))
    groups = groups_of(images)
    grouped = [] if groups is None else map(str, groups.tolist())  # they decide what is drawn
    digest = _digest("\n".join([shape, *lines, *grouped]))
    return f"{len(images)} images of {shape}, checksum {digest}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
