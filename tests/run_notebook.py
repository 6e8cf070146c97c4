"""Run the notebook of examples/ cell by cell in a kernel.

`python tests/run_notebook.py` stores the outputs of its cells in the notebook.
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "learner_to_mixmo.ipynb"
TIMEOUT = 300.0  # seconds per cell


def run_notebook(folder, *, quick=False):
    """Run the notebook in a folder, and return it with the outputs of its cells.

    Args:
        folder: working directory of the kernel.
        quick: whether to train for one epoch, on a ninth of the images, and to search for 30 steps.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells if quick else ():
        cell.source = re.sub(r"fit_one_cycle\(\d+,", "fit_one_cycle(1,", cell.source)
        cell.source = cell.source.replace("lr_find(", "lr_find(num_it=30, ")
        cell.source = cell.source.replace("range(len(images))", "range(0, len(images), 9)")
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=TIMEOUT, resources=resources, record_timing=False)
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return notebook


def is_shown(output):
    """Return whether an output is shown: warnings and finished progress bars are not."""
    html = output.get("data", {}).get("text/html")
    return output.get("name") != "stderr" and html not in ("", "<div></div>")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        executed = run_notebook(folder)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_shown(output)]
    executed.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(executed, NOTEBOOK)
