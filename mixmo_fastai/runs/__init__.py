"""Run folders: what a training leaves on disk.

folder       the run folder
create       create run folders
labels       what runs on several labels per image predict
data_facts   facts about the training data
environment  versions, device and code revision
output       paths for output, checked before any work is done
checkpoints  checkpoint folders, written atomically; the newest two are kept
weights      tensors of a network in one file
files        atomic writing of files
lock         one process at a time trains in a run folder
"""

from mixmo_fastai.imports import lazy_names

_MODULES = {
    "RunFolder": "runs.folder",
    "create_run": "runs.create",
    "open_run": "runs.folder",
}
__all__ = [*_MODULES]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
