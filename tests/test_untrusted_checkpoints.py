"""Checkpoints from untrusted sources are restored or rejected with a readable error."""

import json

import pytest
import torch
from fuzzing import EDITS, FEW_EXAMPLES, JSON, check_read_or_rejected, mutated
from hypothesis import given
from hypothesis import strategies as st
from short_runs import TINY, fit

from mixmo_fastai.callbacks.ema import EMACallback
from mixmo_fastai.config.load import override
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.history import HistoryCallback
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.state import RunState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def resumable(tmp_path_factory):
    """Return a run's state, which restores checkpoints, and the files of a checkpoint."""
    recipe = override(TINY, ["train.epochs=2", "train.ema_decay=0.9"])
    run = create_run(recipe, tmp_path_factory.mktemp("resumable") / "run")
    fit(run, (0, 3))
    training = prepare(recipe)
    averaging = next(cb for cb in training.learn.cbs if isinstance(cb, EMACallback))
    history = HistoryCallback(run, 32)
    state = RunState(training.learn, history, [averaging], training.identity)
    saved = CheckpointStore(run.checkpoint).newest()
    return state, {name: (saved.path / name).read_bytes() for name in saved.files}


def test_unchanged_checkpoint_is_restored(resumable, tmp_path):
    state, files = resumable
    store = CheckpointStore(tmp_path)
    store.save(files.items())
    assert state.restore(store.newest()).position.step == 3


@pytest.mark.parametrize(
    "name",
    ["state.json", "history.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors"],
)
@FEW_EXAMPLES
@given(content=st.binary(max_size=200), edits=EDITS, table=JSON, key=st.integers(0, 30), value=JSON)
def test_any_content_of_checkpoints_is_read_or_rejected(
    resumable, tmp_path_factory, name, content, edits, table, key, value
):
    """The checksums are valid, since an attacker can compute them."""
    state, files = resumable
    contents = [content, mutated(files[name], edits)]
    if name.endswith(".json"):
        changed = json.loads(files[name])
        changed[[*changed][key % len(changed)]] = value
        contents += [json.dumps(table).encode(), json.dumps(changed).encode()]
    for new in contents:
        store = CheckpointStore(tmp_path_factory.mktemp("store"))
        store.save({**files, name: new}.items())
        check_read_or_rejected(lambda store=store: state.restore(store.newest()))


@pytest.mark.parametrize("rows", [[{}], [{}, {"a": 1}], [{"epoch": 1}, {"epoch": 2, "lr": 1}]])
def test_history_with_unequal_rows_is_rejected(resumable, tmp_path, rows):
    state, files = resumable
    history = json.loads(files["history.json"]) | {"rows": rows}
    store = CheckpointStore(tmp_path)
    store.save({**files, "history.json": json.dumps(history).encode()}.items())
    with pytest.raises(InputError, match=r"history\.json of the checkpoint.*the same columns"):
        state.restore(store.newest())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_never_saved(resumable, tmp_path, value):
    from mixmo_fastai.training.state import NotFiniteError, Position

    state, files = resumable
    store = CheckpointStore(tmp_path)
    store.save(files.items())
    state.restore(store.newest())
    state.history.began, state.history.loss_sum = 0.0, torch.tensor(0.0)
    with torch.no_grad():
        next(state.learn.model.parameters()).view(-1)[0] = value
    with pytest.raises(NotFiniteError, match=r"encoders\.0\.weight of the model"):
        state.save(store, Position(0, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["save-000001"]
    state.restore(store.newest())
