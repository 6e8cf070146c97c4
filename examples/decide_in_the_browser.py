"""Show predictions in the browser: accepted or for a person to decide, with the plausible classes.

mixmo export RUN --to net.safetensors
pip install gradio
python examples/decide_in_the_browser.py net.safetensors
"""

import argparse
from pathlib import Path

import gradio as gr

from mixmo_fastai.errors import InputError
from mixmo_fastai.evaluation.decisions import Request, decide_for
from mixmo_fastai.evaluation.predict import predict_images
from mixmo_fastai.export.files import load_fused

MAX_RISK, COVERAGE = 0.1, 0.9


def page(path):
    """Build the page for an exported network."""
    network = load_fused(path)
    decisions = decide_for(Request(coverage=COVERAGE, max_risk=MAX_RISK), network, str(path))

    def decide(image):
        if image is None:
            raise gr.Error("Choose an image.")
        predictions, unreadable = predict_images(network, [Path(image)], decisions=decisions)
        if unreadable:
            raise gr.Error(str(next(iter(unreadable.values()))))
        (found,) = predictions
        decision = "accept" if found.is_accepted else "ask a person"
        return {found.label: found.probability}, decision, " or ".join(found.classes)

    image = gr.Image(type="filepath", label="Image")
    answers = [
        gr.Label(label="Most likely class, with its calibrated probability"),
        gr.Textbox(label=f"Decision: at most {MAX_RISK:.0%} of the accepted predictions are wrong"),
        gr.Textbox(label=f"Plausible classes: the true one is among them for {COVERAGE:.0%}"),
    ]
    return gr.Interface(decide, image, answers, flagging_mode="never", analytics_enabled=False)


def main():
    """Open the page on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", type=Path, help="file of `mixmo export`, .safetensors or .onnx")
    try:
        page(parser.parse_args().network).launch(show_error=True)
    except InputError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
