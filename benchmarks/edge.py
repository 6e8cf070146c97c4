"""Compare predictions on a CPU: torch as in `mixmo eval` and `mixmo predict`, and exported files.

python benchmarks/edge.py [--archs wrn10_2,wrn16_4] [--size 32] [--batch-sizes 1,64] [--threads 1]
                          [--repeats 15] [--out FILE.json]

Each network is trained for a few steps on generated images, and exported by the functions of `mixmo
export` as ONNX in float32 and in 8-bit integers, and as a program of torch.export. Ratios are to
onnxruntime in float32. The accuracy of quantised networks is not measured here, since it is that of
noise; `mixmo export --int8` prints it. The commands fold BatchNorm for more than 512 images; here
it is folded for each batch size.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from cpu_precision import cpu_flags
from measure import RATIO, format_rows, interleaved, paired_ratio, report, spreads
from steps import cpu_parser
from torch import Tensor, nn
from torchvision.io import write_png

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.export.files import export_run, load_fused
from mixmo_fastai.models.folding import fold_batch_norm
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import RunFolder
from mixmo_fastai.runs.weights import load_network
from mixmo_fastai.runtime.devices import keep_freed_memory, move_to_device
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare

MILLISECONDS = "{median:.2f} ms ({min:.2f} to {max:.2f})"
FLOAT32, INT8, PROGRAM = "onnxruntime, float32", "onnxruntime, int8", "torch.export"
TORCH, UNFOLDED = "torch", "torch, BatchNorm not folded"
CLASSES, IMAGES_PER_CLASS, CALLS = 10, 16, {1: 10}


def write_images(folder: Path, size: int) -> Path:
    """Write an image folder with train and test images of noise."""
    random = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in range(CLASSES):
            directory = folder / part / f"class-{label}"
            directory.mkdir(parents=True)
            for number in range(IMAGES_PER_CLASS):
                pixels = torch.randint(256, (3, size, size), generator=random, dtype=torch.uint8)
                write_png(pixels, str(directory / f"{number}.png"))
    return folder


def train(images: Path, arch: str, folder: Path) -> RunFolder:
    """Train a network for one epoch."""
    settings = {
        "model.arch": arch,
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.device": "cpu",
        "train.precision": "float32",
        "data.valid_split": 0.1,
    }
    run = create_run(resolve_recipe(str(images), None, settings), folder / f"run-{arch}")
    train_run(prepare(run.recipe(), folder), run)
    return run


def networks(run: RunFolder, folder: Path, images: Tensor) -> tuple[dict[str, nn.Module], dict]:
    """Return the network in every form, and the sizes of the files in MB."""
    files = {FLOAT32: folder / "float32.onnx", INT8: folder / "int8.onnx"}
    files[PROGRAM] = folder / "program.pt2"
    for name, path in files.items():
        export_run(run, path, max_drop=100.0 if name == INT8 else None)
    fused = move_to_device(load_network(run).fuse(), torch.device("cpu")).eval()
    forms = {
        FLOAT32: load_fused(files[FLOAT32]).model,
        TORCH: fold_batch_norm(fused, images),
        UNFOLDED: fused,
        PROGRAM: torch.export.load(files[PROGRAM]).module(),
        INT8: load_fused(files[INT8]).model,
    }
    return forms, {name: path.stat().st_size / 1e6 for name, path in files.items()}


def prediction(network: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return a function that predicts a batch, ten times if it is of one image."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(CALLS.get(len(x), 1)):
                network(x)

    return run


def measure_arch(arch: str, images: Path, folder: Path, args: argparse.Namespace) -> dict:
    """Measure the forms of a network and print a table per batch size."""
    batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    x = torch.randn(max(batch_sizes), 3, args.size, args.size)
    x = x.contiguous(memory_format=torch.channels_last)
    run = train(images, arch, folder)
    with TemporaryDirectory(dir=folder) as files:
        forms, sizes = networks(run, Path(files), x[:8])
        print(f"{arch}, {args.size}x{args.size}; goal: torch / {FLOAT32} at most 1")
        for name, size in sizes.items():
            print(f"  {name:<44}{size:.2f} MB")
        results: dict[str, object] = {"megabytes": sizes}
        for count in batch_sizes:
            functions = {name: prediction(network, x[:count]) for name, network in forms.items()}
            milliseconds = {
                name: [1000 * s / CALLS.get(count, 1) for s in seconds]
                for name, seconds in interleaved(functions, args.repeats).items()
            }
            ratios = {
                f"{name} / {FLOAT32}": paired_ratio(values, milliseconds[FLOAT32])
                for name, values in milliseconds.items()
                if name != FLOAT32
            }
            times = spreads(milliseconds)
            for name, text in format_rows(times, MILLISECONDS) + format_rows(ratios, RATIO):
                print(f"  batch {count:>3}: {name:<51}{text}")
            results[f"batch {count}"] = {"milliseconds": times, "ratios": ratios}
    return results


def main() -> None:
    parser = cpu_parser(__doc__, repeats=15)
    parser.add_argument("--archs", default="wrn10_2,wrn16_4")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-sizes", default="1,64")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the commands do
    with TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", args.size)
        results = {arch: measure_arch(arch, images, folder, args) for arch in args.archs.split(",")}
    rows = [
        ("instructions of the CPU", ", ".join(cpu_flags()) or "unknown"),
        ("kernels of torch", torch.backends.cpu.get_cpu_capability()),
        ("onnxruntime", onnxruntime.__version__),
    ]
    report("This machine", rows, {"networks": results, "onnxruntime": rows[2][1]}, args.out)


if __name__ == "__main__":
    main()
