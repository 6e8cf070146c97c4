"""A run records when its number of threads changed."""

from functools import partial

import pytest
from short_runs import TINY, fit

from mixmo_fastai.config.load import override
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


@pytest.mark.parametrize(("given", "recorded"), [(1, []), (2, [2]), (0, [])])
def test_a_new_network_may_start_with_another_number(tmp_path, given, recorded):
    run = create_run(
        override(TINY, ["train.epochs=1", f"train.threads={given and 1}"]), tmp_path / "run"
    )
    fit(run, resume=True, prepare=partial(prepare, threads=given or None))
    changes = run.environment().get("thread_changes", [])
    assert changes == [{"epoch": 0, "step": 0, "threads": number} for number in recorded]
