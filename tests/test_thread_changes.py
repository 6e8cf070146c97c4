"""A run records when its number of threads changed."""

from functools import partial

import pytest
from short_runs import TINY, fit

from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.prepare import prepare


def test_changes_are_recorded(tmp_path):
    recipe = override(TINY, ["data.limit=24", "train.threads=2"])
    run = create_run(recipe, tmp_path / "run")
    fit(run, (0, 1))
    assert "thread_changes" not in run.environment()
    recorded = [{"epoch": 0, "step": 1, "threads": 1}, {"epoch": 1, "step": 1, "threads": 2}]
    fit(run, (1, 1), resume=True, prepare=partial(prepare, threads=1))
    assert run.environment()["thread_changes"] == recorded[:1]
    fit(run, resume=True)
    assert run.environment()["thread_changes"] == recorded
    fit(run, resume=True, prepare=partial(prepare, threads=1))  # no step is left
    assert run.environment()["thread_changes"] == recorded


def test_a_stop_in_the_last_validation_leaves_no_step(tmp_path):
    run = create_run(override(TINY, ["train.epochs=1", "train.threads=2"]), tmp_path / "run")
    fit(run, (0, 1), validating=True)
    fit(run, resume=True, prepare=partial(prepare, threads=1))
    assert "thread_changes" not in run.environment()


def test_a_training_from_scratch_forgets_changes(tmp_path):
    run = create_run(override(TINY, ["train.epochs=1", "train.threads=0"]), tmp_path / "run")
    run.record_threads(1, 2, epoch=0, step=4)
    fit(run, resume=True)
    assert run.environment()["thread_changes"] == []


@pytest.mark.parametrize(
    ("position", "number", "expected"),
    [
        ((1, 5), 2, [(0, 4, 1), (1, 5, 2)]),
        ((1, 5), 1, [(0, 4, 1)]),
        ((0, 4), 1, [(0, 4, 1)]),
        ((0, 3), 2, []),
        ((0, 0), 3, [(0, 0, 3)]),
        ((2, 1), 2, [(0, 4, 1), (2, 0, 2)]),
    ],
)
def test_an_earlier_checkpoint_removes_later_changes(tmp_path, position, number, expected):
    run = create_run(TINY, tmp_path / "run")
    run.record_threads(1, 2, epoch=0, step=4)
    run.record_threads(2, 2, epoch=2, step=0)
    run.record_threads(number, 2, epoch=position[0], step=position[1])
    changes = run.environment()["thread_changes"]
    assert [tuple(each.values()) for each in changes] == expected


@pytest.mark.parametrize("changes", ["[{}]", "3", "[1]", '[{"epoch": 0, "step": "a"}]'])
def test_damaged_changes_are_named(tmp_path, changes):
    run = create_run(TINY, tmp_path / "run")
    (run.path / "environment.json").write_text(f'{{"thread_changes": {changes}}}')
    with pytest.raises(InputError, match="is damaged: each of thread_changes needs epoch"):
        run.record_threads(1, 2, epoch=2, step=0)


@pytest.mark.parametrize(("given", "recorded"), [(1, []), (2, [2]), (0, [])])
def test_a_new_network_may_start_with_another_number(tmp_path, given, recorded):
    run = create_run(
        override(TINY, ["train.epochs=1", f"train.threads={given and 1}"]), tmp_path / "run"
    )
    fit(run, resume=True, prepare=partial(prepare, threads=given or None))
    changes = run.environment().get("thread_changes", [])
    assert changes == [{"epoch": 0, "step": 0, "threads": number} for number in recorded]
