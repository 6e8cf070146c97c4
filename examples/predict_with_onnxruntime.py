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
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    return ((pixels - np.float32(facts["mean"])) / np.float32(facts["std"])).transpose(2, 0, 1)


def main():
    """Print the class of each image and its probability."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", help="file of `mixmo export`")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.network, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["mixmo"])["data"]
    for path in args.images:
        with Image.open(path) as image:
            batch = prepare(image, facts)[None]
        (logits,) = session.run(["logits"], {"images": batch})
        weights = np.exp(logits[0] - logits[0].max())
        best = int(weights.argmax())
        print(f"{path}: {facts['classes'][best]}, probability {weights[best] / weights.sum():.4f}")


if __name__ == "__main__":
    main()
