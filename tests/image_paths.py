"""Empty image files in class folders, and the images that are chosen from them."""

import dataclasses
import json

from mixmo_fastai.data.parts import DataParts


def write(root, *names):
    """Create empty image files, and folders for names that end in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def images(part, **counts):
    """Return paths of images in class folders: images("train", cat=2) for two images of cats."""
    prefix = f"{part}/" if part else ""
    return [f"{prefix}{name}/{i}.jpg" for name, count in counts.items() for i in range(count)]


def counts(files):
    return {name: len(paths) for name, paths in files.items()}


def find_note(chosen, label):
    return "; ".join(text for found, text in chosen.notes if found == label)


def stored_parts(chosen):
    """Convert the parts to JSON and back, as a run stores them."""
    values = json.loads(json.dumps(dataclasses.asdict(chosen.parts)))
    return DataParts.from_mapping(values, "split.json")
