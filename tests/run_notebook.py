"""Run a notebook cell by cell in a kernel, as a reader does.

`python tests/run_notebook.py` writes into the notebook of examples/ what its cells give.
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "learner_to_mixmo.ipynb"
PATIENCE = 300.0  # seconds for a cell


def run_notebook(folder, *, quick=False):
    """Run the notebook in a folder, and give it with what its cells gave.

    Args:
        folder: where it runs.
        quick: train for one epoch instead of several, on a third of the images.
    """
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells if quick else ():
        cell.source = re.sub(r"fit_one_cycle\(\d+,", "fit_one_cycle(1,", cell.source)
        cell.source = cell.source.replace("range(len(images))", "range(0, len(images), 3)")
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=PATIENCE, resources=resources, record_timing=False)
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return book


def is_shown(output):
    """Tell whether an output is for readers: no warning of a library, no emptied progress bar."""
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
