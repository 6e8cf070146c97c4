"""Predict images in an app with onnxruntime, without torch and without this package.

mixmo export RUN --to net.onnx
pip install onnxruntime pillow
python examples/predict_with_onnxruntime.py net.onnx cat.jpg dog.jpg
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(image, facts):
    """Resize and standardise an image: (C, H, W) float32."""
    channels, height, width = facts["image_shape"]
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    return ((pixels - np.float32(facts["mean"])) / np.float32(facts["std"])).transpose(2, 0, 1)


def plausible_classes(probabilities, threshold):
    """Return the prediction set by the score RAPS, most likely class first."""
    order = (-probabilities).argsort(kind="stable")
    larger = probabilities[order].cumsum() - probabilities[order]
    scores = larger.round(6) + 0.05 * np.arange(len(order))
    return order[: int((scores <= threshold).sum())]


def main():
    """Print the class of each image, its probability, and the classes for a coverage of 90 %."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", help="file of `mixmo export`")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.network, providers=["CPUExecutionProvider"])
    header = json.loads(session.get_modelmeta().custom_metadata_map["mixmo"])
    facts, calibration = header["data"], header["calibration"]  # null without validation images
    threshold = calibration and calibration["sets"].get("raps", {}).get("0.9")
    for path in args.images:
        with Image.open(path) as image:
            batch = prepare(image, facts)[None]
        (logits,) = session.run(["logits"], {"images": batch})
        logits = logits[0].astype(np.float64)
        if calibration and calibration["scaling"] and not calibration["in_logits"]:  # --raw
            scaling = calibration["scaling"]
            logits = logits * scaling["scale"] + (scaling["bias"] or 0)
        if labels := header.get("labels"):  # several labels per image
            probabilities = 1 / (1 + np.exp(-logits / labels["temperature"]))
            chosen = [f"{facts['classes'][k]} {probabilities[k]:.4f}"
                      for k in np.flatnonzero(probabilities > labels["thresholds"])]  # fmt: skip
            print(f"{path}: {', '.join(chosen) or 'no label'}")
            continue
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        best = int(probabilities.argmax())
        text = f"{path}: {facts['classes'][best]}, probability {probabilities[best]:.4f}"
        if threshold:
            plausible = plausible_classes(probabilities, threshold[0])
            text += f", 90 %: {' or '.join(facts['classes'][label] for label in plausible)}"
        print(text)


if __name__ == "__main__":
    main()
