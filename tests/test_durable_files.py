"""Files are complete on disk before others are renamed or removed."""

import pytest
from disk_faults import CONTENT, DiskRecorder, run_and_kill
from short_runs import TINY

from mixmo_fastai.errors import InputError
from mixmo_fastai.runs import files
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run

pytestmark = pytest.mark.slow


def test_saved_checkpoints_survive_a_power_failure(tmp_path, monkeypatch):
    """Files are flushed before they are renamed, and names before older files are removed."""
    disk = DiskRecorder()
    monkeypatch.setattr(files, "os", disk)
    run = create_run(TINY, tmp_path / "run")
    assert not disk.dirty
    assert not any(disk.unnamed.values())
    for number in range(4):
        CheckpointStore(run.checkpoint).save(CONTENT)
        assert not disk.dirty
        assert not any(disk.unnamed.values()), number
    assert len([name for name in disk.renames if "save-" in name]) == 4


def test_partly_created_run_is_not_a_run(tmp_path):
    fatal, done = 0, False
    while not done:
        fatal += 1
        path = tmp_path / f"run-{fatal}"
        done = not run_and_kill(lambda path=path: create_run(TINY, path), fatal, half=True)
        if (path / "recipe.toml").exists():
            assert open_run(path).recipe() == TINY
        else:
            with pytest.raises(InputError):
                open_run(path)
    assert fatal > 8


def test_existing_file_is_not_overwritten_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    files.write_new(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "file", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
