"""Folders in the layout of the Hugging Face Hub: a fused network, its configuration and its card.

config.json         architecture, classes, normalisation and thresholds
model.safetensors   the weights, as `mixmo export` writes them
README.md           the card, from the files of the run

Shapes: B images of C channels, H × W pixels, K classes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn

from mixmo_fastai.config.choices import HUB_PREFIX
from mixmo_fastai.config.hub_names import local_path
from mixmo_fastai.errors import InputError, summarize_error
from mixmo_fastai.export.card import model_card
from mixmo_fastai.export.files import (
    CONFIG,
    WEIGHTS,
    check_export,
    export_run,
    load_fused,
    plain_network,
    write_fused,
)
from mixmo_fastai.metrics.multi_label import LabelDecisions
from mixmo_fastai.runs.data_facts import DataFacts
from mixmo_fastai.runs.folder import RunFolder

LIBRARY = "mixmo-fastai"
_REQUIRED = ("architecture", "classes", "mean", "std", "image_shape")
"""What config.json must have."""
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
"""Libraries of connections whose errors the Hub's library passes on."""


class FusedClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name=LIBRARY,
    tags=["image-classification", "mixmo"],
):
    """A fused network as the Hub's own library loads and saves it.

        FusedClassifier.from_pretrained("USER/NAME")  # or a folder

    Args:
        architecture: name of the network.
        classes: names of the K classes, in the order of the logits.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        image_shape: (C, H, W).
        calibration: thresholds, as in the header of an exported file; None without calibration.
        labels: thresholds and temperature of several labels per image, as there; None with one.

    Attributes:
        network: the plain network.

    Raises:
        InputError: the architecture is unknown, or an argument is impossible; from
            `from_pretrained`, also if config.json is missing or incomplete.
    """

    def __init__(
        self,
        architecture: str,
        *,
        classes: list[str],
        mean: list[float],
        std: list[float],
        image_shape: list[int],
        calibration: dict[str, Any] | None = None,
        labels: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        values = {"classes": classes, "mean": mean, "std": std, "image_shape": image_shape}
        values["is_multi_label"] = labels is not None
        try:
            self.facts = DataFacts.from_mapping(values)
            self.labels = (
                None if labels is None else LabelDecisions.from_mapping(labels, len(classes))
            )
        except ValueError as error:
            raise InputError(f"Impossible configuration: {error}.") from error
        self.architecture, self.calibration = architecture, calibration
        self.network = plain_network(architecture, self.facts)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits: standardised images (B, C, H, W) -> (B, K)."""
        logits: Tensor = self.network(images)
        return logits

    def _save_pretrained(self, save_directory: Path) -> None:
        parts = self.architecture, self.facts, self.calibration
        write_fused(self.network, *parts, save_directory / WEIGHTS, labels=self.labels)
        _write_config(save_directory, *parts, self.labels)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None = None, **arguments: Any
    ) -> "FusedClassifier":
        missing = [name for name in _REQUIRED if name not in arguments]
        if missing:
            text = f"{CONFIG} in {model_id!r} is missing, or has no {missing[0]!r}"
            if os.path.isdir(model_id):
                path = Path(model_id, CONFIG)
                has_file = path.is_file()
                text = f"{path} has no {missing[0]!r}" if has_file else f"There is no file {path}"
            raise InputError(f"{text}.\nGive a folder or a repository that mixmo push wrote.")
        return super()._from_pretrained(model_id=model_id, revision=revision, **arguments)

    @classmethod
    def _load_as_safetensor(
        cls, model: "FusedClassifier", model_file: str, map_location: str, strict: bool
    ) -> "FusedClassifier":
        loaded = load_fused(model_file)
        if (loaded.arch, loaded.facts) != (model.architecture, model.facts):
            raise InputError(f"{model_file} does not belong to the {CONFIG} beside it.")
        model.network = loaded.model.to(map_location)
        return model.eval()


def write_hub_folder(
    run: RunFolder,
    folder: Path,
    data_dir: Path | None = None,
    *,
    address: str,
    license_id: str = "unknown",
    raw: bool = False,
) -> dict[str, Any]:
    """Write a finished run in the layout of the Hub, fused into one plain network.

    Args:
        run: a finished run of one network.
        folder: a folder that exists and is empty.
        data_dir: folder of the run's data, if not the one that training used.
        address: how `load_fused` will find it, for the card: a folder, or "hf:USER/NAME".
        license_id: licence of the weights, by its identifier on the Hub.
        raw: whether to write the logits without calibration.

    Returns:
        The result of `export_run`.

    Raises:
        InputError: as for `export_run`.
    """
    result = export_run(run, folder / WEIGHTS, data_dir, raw=raw)
    loaded = load_fused(folder / WEIGHTS)
    calibration = None if loaded.calibration is None else loaded.calibration.entry
    _write_config(folder, loaded.arch, loaded.facts, calibration, loaded.labels)
    text = model_card(run, address, loaded.facts, license_id=license_id, is_calibrated=not raw)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return result


def _write_config(
    folder: Path,
    arch: str,
    facts: DataFacts,
    calibration: Mapping[str, Any] | None,
    labels: LabelDecisions | None,
) -> None:
    """Write the arguments of `FusedClassifier`, and the names that the Hub's pages know."""
    config = {
        "model_type": "mixmo",
        "architecture": arch,
        "classes": list(facts.classes),
        "mean": list(facts.mean),
        "std": list(facts.std),
        "image_shape": list(facts.image_shape),
        "id2label": {str(index): name for index, name in enumerate(facts.classes)},
        "label2id": {name: index for index, name in enumerate(facts.classes)},
        "calibration": calibration,
    }
    if labels is not None:
        config["labels"] = asdict(labels)
        config["problem_type"] = "multi_label_classification"
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def push_run(
    run: RunFolder,
    to: str,
    data_dir: Path | None = None,
    *,
    license_id: str = "unknown",
    private: bool = False,
    overwrite: bool = False,
    raw: bool = False,
) -> dict[str, Any]:
    """Write a finished run to a folder, or to a repository of the Hub.

    Args:
        run: a finished run of one network.
        to: a folder that does not exist yet or is empty, or "hf:USER/NAME".
        data_dir: folder of the run's data, if not the one that training used.
        license_id: see `write_hub_folder`.
        private: whether the repository is private; an existing one must be.
        overwrite: whether to replace the network of an existing repository.
        raw: see `write_hub_folder`.

    Returns:
        The result of `export_run`, and "to", the folder or the address of the repository.

    Raises:
        InputError: as for `export_run`; or the folder is not empty, or the repository has a network
            or is public, or the Hub cannot be reached or refuses the upload.
    """
    check_export(run, Path(WEIGHTS), push_to=to)
    run.metrics()  # the card states them
    if not to.startswith(HUB_PREFIX):
        folder = Path(os.path.expanduser(to))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{to!r} exists and was not changed. Choose another --to.")
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"address": folder.resolve().name, "license_id": license_id, "raw": raw}
        with TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
            result = write_hub_folder(run, Path(temporary), data_dir, **settings)
            for path in Path(temporary).iterdir():
                path.rename(folder / path.name)
        return {**result, "to": str(folder)}
    repository = to.removeprefix(HUB_PREFIX)
    api = HfApi(library_name=LIBRARY)
    with _reported(f"push to {repository}"):
        _check_repository(api, repository, private=private, overwrite=overwrite)
    with TemporaryDirectory() as temporary:
        settings = {"address": to, "license_id": license_id, "raw": raw}
        result = write_hub_folder(run, Path(temporary), data_dir, **settings)
        with _reported(f"push to {repository}"):
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=temporary, commit_message="Add the network"
            )
    return {**result, "to": str(url)}


def _check_repository(api: HfApi, repository: str, *, private: bool, overwrite: bool) -> None:
    """Check that a repository does not exist, or may be written to.

    Raises:
        InputError: it is public, but is to be private; or it has files that are not to be replaced.
    """
    try:
        found = api.repo_info(repository)
    except RepositoryNotFoundError:
        return
    if private and not found.private:
        raise InputError(f"The repository {repository} exists and is public. Choose another name.")
    names = {each.rfilename for each in found.siblings or ()} & {WEIGHTS, CONFIG, "README.md"}
    if names and not overwrite:
        raise InputError(
            f"The repository {repository} has {', '.join(sorted(names))}. It was not changed.\n"
            "Choose another name, or replace them: --overwrite"
        )


@contextmanager
def _reported(action: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
        is_connection = type(error).__module__.partition(".")[0] in _CLIENTS
        if not isinstance(error, known) and not is_connection:
            raise
        advice = "Log in with `hf auth login`, or write a folder: --to FOLDER."
        if action.startswith("load"):
            advice = (
                "There is no local folder of this name either.\n"
                "Check the name and the connection, or log in with `hf auth login`."
            )
        raise InputError(f"Cannot {action}: {summarize_error(error)}.\n{advice}") from error


def download_weights(name: str) -> Path:
    """Return the weights of a repository, or of a folder in its layout.

    Args:
        name: USER/NAME, optionally with @REVISION, or a folder.

    Raises:
        InputError: there is no such repository or file, or it cannot be reached.
    """
    if (path := local_path(name)) is not None:
        return path / WEIGHTS if path.is_dir() else path
    repository, _, revision = name.partition("@")
    with _reported(f"load {WEIGHTS} of {repository!r}"):
        return Path(hf_hub_download(repository, WEIGHTS, revision=revision or None))
