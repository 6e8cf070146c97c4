"""The choice of the number of threads on a CPU."""

import json
import re
from types import SimpleNamespace

import pytest
import short_runs
import torch
from short_runs import Watch, assert_same, fit
from training_states import TINY, assert_unchanged, state_of

from mixmo_fastai.cli.plan import threads_text
from mixmo_fastai.cli.program import run as program
from mixmo_fastai.config.load import override, recipe_from_mapping
from mixmo_fastai.errors import InputError
from mixmo_fastai.runs.checkpoints import CheckpointStore
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.runs.folder import open_run
from mixmo_fastai.runtime import acceleration
from mixmo_fastai.runtime.cpus import AFFINITY, ALL, OPENMP, QUOTA, CpuLimit
from mixmo_fastai.runtime.signals import InterruptedBySignal, StopRequest
from mixmo_fastai.training import precision, threads, trials
from mixmo_fastai.training.prepare import prepare
from mixmo_fastai.training.speed import operations_per_image
from mixmo_fastai.training.threads import ThreadChoice, choose_threads, keep_threads
from mixmo_fastai.training.train import train
from mixmo_fastai.training.trials import StepTimes

FIT = "fit digits --arch wrn10_1 --limit 48 --epochs 1 --batch-size 16 --device cpu"


@pytest.fixture
def available(monkeypatch):
    """Return a function that simulates a number of available threads; two at first."""

    def set_limit(count, reason=ALL):
        limit = CpuLimit(count, reason)
        monkeypatch.setattr(threads, "thread_limit", lambda: limit)
        monkeypatch.setattr(acceleration, "thread_limit", lambda: limit)

    set_limit(2)
    return set_limit


@pytest.fixture
def measured(monkeypatch):
    """Return a function that simulates step times by number of threads, for each round."""
    calls = []

    def set_times(**seconds):
        def compare(_, settings, **options):
            calls.append(([each.threads for each in settings], options))
            rounds = zip(*(seconds[f"t{each.threads}"] for each in settings), strict=True)
            return StepTimes(tuple(rounds), 16)

        monkeypatch.setattr(threads, "expected_seconds", lambda _: 100.0)
        monkeypatch.setattr(threads, "compare_settings", compare)
        return calls

    return set_times


def never(*_, **__):
    pytest.fail("measured")


class TestChoice:
    @pytest.mark.parametrize(
        ("number", "expected"),
        [(1, [1]), (2, [1, 2]), (3, [1, 3]), (5, [1, 2, 5]), (64, [1, 32, 64])],
    )
    def test_one_half_and_all_are_compared(self, number, expected):
        assert threads.candidates(number) == expected

    @pytest.mark.parametrize(
        ("seconds", "choice"),
        [
            ({"t1": [1.0], "t4": [0.6], "t8": [0.5]}, 8),
            ({"t1": [1.0], "t4": [0.6], "t8": [0.58]}, 4),  # not worth it
            ({"t1": [1.0], "t4": [0.95], "t8": [0.9]}, 8),  # compared with the best so far
            ({"t1": [1.0], "t4": [0.95], "t8": [0.95]}, 1),
            ({"t1": [1.0], "t4": [50.0], "t8": [99.0]}, 1),
            ({"t1": [1.0, 1.0, 1.0], "t4": [0.6, 0.6, 9.0], "t8": [0.5, 0.5, 50.0]}, 1),
        ],
        ids=["all", "half", "all, not half", "one", "slow", "slow at times"],
    )
    def test_the_fastest_number_becomes_part_of_the_recipe(
        self, available, measured, seconds, choice
    ):
        available(8, QUOTA)
        calls = measured(**seconds)
        training = prepare(TINY)
        chosen, why = choose_threads(training)
        assert calls[0][0] == [1, 4, 8]
        assert chosen.recipe == override(training.recipe, [f"train.threads={choice}"])
        assert chosen.acceleration.threads == chosen.num_threads == why.threads == choice
        assert (why.available, why.limit) == (8, QUOTA)
        means = {number: sum(seconds[f"t{number}"]) / len(seconds["t1"]) for number in (1, 4, 8)}
        assert why.step_seconds == pytest.approx(means)
        others = {number: mean for number, mean in means.items() if number != choice}
        assert why.compared == min(others, key=others.get)
        assert why.ratio == pytest.approx(means[why.compared] / means[choice])
        assert chosen.learn is training.learn

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_a_given_number_is_kept(self, monkeypatch, available, number):
        monkeypatch.setattr(threads, "compare_settings", never)
        training = prepare(override(TINY, [f"train.threads={number}"]))
        assert choose_threads(training) == (training, None)
        assert training.acceleration.threads == number
        assert training.num_threads == (number or torch.get_num_threads())

    def test_nothing_is_measured_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(threads, "compare_settings", never)
        training = SimpleNamespace(device=torch.device("cuda"), recipe=TINY)
        assert choose_threads(training) == (training, None)

    def test_a_single_thread_is_not_measured(self, monkeypatch, available):
        available(1, AFFINITY)
        monkeypatch.setattr(threads, "compare_settings", never)
        assert choose_threads(prepare(TINY))[1] == ThreadChoice(1, 1, AFFINITY, {})

    def test_short_runs_use_all_threads(self, monkeypatch, available):
        available(6, QUOTA)
        monkeypatch.setattr(trials, "copy_for_timing", never)
        chosen, why = choose_threads(prepare(TINY))
        assert why == ThreadChoice(6, 6, QUOTA, {})
        assert chosen.recipe.train.threads == 6

    @pytest.mark.parametrize(
        ("expected", "fraction", "step", "compared"),
        [
            (2.0, 1, 0.9, True),
            (10.0, 1, 0.1, False),  # as fast as assumed
            (10.0, 1, 0.21, True),  # the operations of a step were planned for 0.075 s
            (10.0, 1, None, False),  # a step fails
            (10.0, 0.5, 0.21, False),
            (19.0, 1, 0.0, False),
            (40.0, 0.5, 99.0, True),
            (200.0, 0.05, 0.21, True),
        ],
    )
    def test_a_few_steps_check_the_estimate_of_short_runs(
        self, available, measured, monkeypatch, expected, fraction, step, compared
    ):
        calls = measured(t1=[1.0], t2=[2.0])
        monkeypatch.setattr(threads, "MIN_PROBED_STEPS", 1)
        monkeypatch.setattr(threads, "expected_seconds", lambda _: expected)
        monkeypatch.setattr(threads, "measure_on_copy", lambda _, measure: step and measure())
        monkeypatch.setattr(threads, "time_steps", lambda *_: step)
        monkeypatch.setattr(threads, "copy_for_timing", lambda _, size: sizes.append(size))
        sizes = []
        training = prepare(override(TINY, ["data.limit=0", "train.batch_size=512"]))
        rate = operations_per_image(training) * training.images_seen / expected
        monkeypatch.setattr(threads, "assumed_rate", lambda _: rate)
        _, why = choose_threads(training, fraction)
        assert why.threads == (1 if compared else 2)
        assert [each["run_seconds"] for _, each in calls] == [20.0] * compared
        if sizes:
            share = sizes[0] * training.recipe.mix.batch_repetitions / training.images_seen
            assert share * expected == pytest.approx(0.075, rel=0.3)

    @pytest.mark.parametrize(("fraction", "probed"), [(1, True), (0.99, False)])
    def test_runs_of_a_few_steps_are_not_probed(self, available, monkeypatch, fraction, probed):
        calls = []
        monkeypatch.setattr(threads, "measure_on_copy", lambda *_: calls.append(1))
        training = prepare(override(TINY, ["train.epochs=10"]))
        monkeypatch.setattr(threads, "MIN_PROBED_STEPS", training.num_steps)
        assert choose_threads(training, fraction)[1].threads == 2
        assert len(calls) == probed

    def test_probing_does_not_change_the_run(self, monkeypatch, available):
        monkeypatch.setattr(threads, "MIN_PROBED_STEPS", 1)
        monkeypatch.setattr(threads, "compare_settings", lambda *_, **__: None)  # if it is slow
        training = prepare(override(TINY, ["train.ema_decay=0.9"]))
        before = state_of(training)
        assert choose_threads(training)[1] == ThreadChoice(2, 2, ALL, {})
        assert_unchanged(before, state_of(training))

    def test_measuring_does_not_change_the_run(self, monkeypatch, available):
        monkeypatch.setattr(threads, "MIN_RUN_SECONDS", 0.0)
        monkeypatch.setattr(trials, "MAX_FRACTION", 1e3)
        monkeypatch.setattr(trials, "MAX_SECONDS", 0.5)
        training = prepare(override(TINY, ["train.ema_decay=0.9"]))
        before = state_of(training)
        _, why = choose_threads(training)
        assert why.step_seconds.keys() == {1, 2}
        assert min(why.step_seconds.values()) > 0
        assert_unchanged(before, state_of(training))

    def test_the_program_uses_all_available_threads_without_mixmo_fit(self, available):
        available(3, OPENMP)
        training = prepare(TINY)
        assert training.acceleration.threads == training.num_threads == 3

    def test_torch_may_limit_the_number(self, monkeypatch):
        monkeypatch.setattr(acceleration, "available_threads", lambda: CpuLimit(64, QUOTA))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
        assert acceleration.thread_limit() == CpuLimit(32, acceleration.TORCH)
        monkeypatch.setattr(acceleration, "available_threads", lambda: CpuLimit(8, QUOTA))
        assert acceleration.thread_limit() == CpuLimit(8, QUOTA)


@pytest.fixture
def stored(available):
    """Prepare the training of a run for which two threads were chosen, and its environment."""
    training = prepare(override(TINY, ["train.threads=2"]))
    return training, {"chosen_threads": ThreadChoice(2, 2, ALL, {}).as_dict()}


class TestResume:
    def test_the_number_is_kept(self, stored, measured):
        calls = measured(t1=[1.2] * 3, t2=[1.0] * 3)
        training, choice = keep_threads(*stored, 0.25)
        assert choice is None
        assert training.acceleration.threads == 2
        assert calls[0][1]["run_seconds"] == 25

    @pytest.mark.parametrize(
        ("rounds", "number"), [([2.0, 1.26, 3.0], 1), ([2.0, 1.24, 3.0], 2), ([0.9, 50, 50], 2)]
    )
    def test_it_changes_only_if_it_is_much_slower_in_every_round(
        self, stored, measured, rounds, number
    ):
        measured(t1=[1.0] * 3, t2=rounds)
        training, choice = keep_threads(*stored)
        assert training.num_threads == number
        assert training.recipe == stored[0].recipe
        if number == 2:
            assert choice is None
        else:
            assert (choice.threads, choice.before, choice.compared) == (1, 2, 2)
            assert choice.ratio == pytest.approx(sum(rounds) / 3)

    def test_a_number_that_is_no_longer_available_is_reduced(self, stored, available, monkeypatch):
        monkeypatch.setattr(threads, "compare_settings", never)
        available(1, QUOTA)
        training, choice = keep_threads(*stored)
        assert choice == ThreadChoice(1, 1, QUOTA, {}, before=2)
        assert training.num_threads == 1

    @pytest.mark.parametrize("content", [{}, {"chosen_threads": 3}, {"chosen_threads": {}}])
    def test_a_given_number_is_kept(self, stored, available, monkeypatch, content):
        """Such as that of a run of version 0.1.0, or after a change of recipe.toml."""
        monkeypatch.setattr(threads, "compare_settings", never)
        available(1)
        assert keep_threads(stored[0], content) == (stored[0], None)
        assert threads.reduced_threads(stored[0].recipe, content) is None

    @pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, None), (3, None)])
    def test_a_training_is_prepared_with_the_available_number(
        self, stored, available, count, expected
    ):
        available(count)
        assert threads.reduced_threads(stored[0].recipe, stored[1]) == expected

    def test_a_run_of_two_threads_is_resumed_bit_for_bit(self, tmp_path):
        recipe = override(short_runs.TINY, ["data.limit=24", "train.threads=2"])
        expected, run = (create_run(recipe, tmp_path / name) for name in ("whole", "resumed"))
        steps = fit(expected)
        assert fit(run, (1, 1)) + fit(run, resume=True) == steps
        assert_same(expected, run)

    def test_another_number_of_threads_is_reported(self, tmp_path):
        run = create_run(override(TINY, ["train.threads=1"]), tmp_path / "run")
        stop, lines = StopRequest(), []
        with pytest.raises(InterruptedBySignal):
            train(prepare(run.recipe()), run, cbs=[Watch(stop, (0, 1))], stop=stop)
        path = CheckpointStore(run.checkpoint).newest().path / "state.json"
        assert json.loads(path.read_text())["num_threads"] == 1
        training = prepare(run.recipe(), threads=2)
        train(training, run, resume=True, say=lines.append)
        text = "Trained so far with threads: 1, now 2: results agree up to rounding."
        assert text in lines


class TestCommand:
    @pytest.mark.parametrize(
        ("choice", "text"),
        [
            (ThreadChoice(1, 1, OPENMP, {}), "1, the only one available (OMP_NUM_THREADS)"),
            (
                ThreadChoice(2, 2, QUOTA, {}),
                "2, all that are available (CPU quota); fewer were not timed; change with",
            ),
            (
                ThreadChoice(2, 2, ALL, {}, 1, 1.3),
                "2, all that are available, measured to be 1.30 times as fast as 1; change with",
            ),
            (
                ThreadChoice(1, 4, AFFINITY, {}, 2, 5.0),
                "1 of 4 (CPU affinity), measured to be 5.00 times as fast as 2; change with",
            ),
            (ThreadChoice(1, 2, ALL, {}, 2, 52.8), "1 of 2, measured to be 53 times as fast as 2;"),
            (
                ThreadChoice(1, 2, ALL, {}, 2, 1 / 1.05),
                "1 of 2; 2 measured to be only 1.05 times as fast; change with --threads",
            ),
        ],
    )
    def test_the_plan_shows_the_choice_and_the_run_stores_it(
        self, monkeypatch, available, tmp_path, capsys, choice, text
    ):
        monkeypatch.setattr(threads, "_choose", lambda *_: choice)
        folder = tmp_path / "run"
        assert program([*FIT.split(), "--out", str(folder)]) == 0
        assert f"Threads     {text}" in capsys.readouterr().out
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["chosen_threads"] == choice.as_dict()
        assert environment["device"].endswith(f", {choice.threads} threads")
        assert open_run(folder).recipe().train.threads == choice.threads

    @pytest.mark.parametrize(
        ("number", "before", "text"),
        [
            (2, 8, "2 instead of 8, of 4 available now (CPU quota), measured to be 3.00 times"),
            (2, 4, "2 instead of 4, measured to be 3.00 times as fast as 4"),
            (4, 8, "4 instead of 8, all that are available now (CPU quota), measured to be 3.00"),
        ],
    )
    def test_the_plan_of_a_resumed_run_names_the_number_before(self, number, before, text):
        choice = ThreadChoice(number, 4, QUOTA, {}, compared=6 - number, ratio=3.0, before=before)
        assert threads_text(choice).startswith(text)

    def test_timing_is_announced_once_before_the_plan(
        self, monkeypatch, available, tmp_path, capsys
    ):
        monkeypatch.setattr(threads, "expected_seconds", lambda _: 100.0)
        monkeypatch.setattr(precision, "expected_seconds", lambda _: 100.0)
        monkeypatch.setattr(trials, "_measure", lambda *_: [(1.0, 2.0)])
        folder = tmp_path / "run"
        assert program([*FIT.split(), "--out", str(folder)]) == 0
        first, second, *rest = capsys.readouterr().out.splitlines()
        assert first == "Timing training steps, to choose the fastest settings …"
        assert second.startswith("Data ")
        assert first not in rest
        assert open_run(folder).recipe().train.threads == 1

    def test_a_search_of_the_learning_rate_chooses_too(
        self, monkeypatch, available, measured, tmp_path, capsys
    ):
        calls = measured(t1=[1.0], t2=[3.0])
        monkeypatch.chdir(tmp_path)
        arguments = FIT.replace("fit", "lr-find").replace("--epochs 1", "--set train.epochs=1")
        assert program([*arguments.split(), "--steps", "30"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^Threads +1 of 2, measured to be 3.00 times as fast as 2;", out, re.M)
        assert re.search(r"^Device .* 1 thread,", out, re.M)
        steps = 48 * 4 // 16  # of the whole run, which was said to take 100 seconds
        assert calls[0][1]["run_seconds"] == pytest.approx(100 * 30 / steps)

    def test_a_resumed_run_says_that_fewer_are_available(
        self, monkeypatch, available, tmp_path, capsys
    ):
        folder = tmp_path / "run"
        available(1000)  # more than this machine would accept
        monkeypatch.setattr(acceleration, "MAX_THREADS_PER_PROCESSOR", 1000)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        assert program([*FIT.split(), "--out", str(folder)]) == 0
        monkeypatch.undo()
        monkeypatch.setattr(threads, "thread_limit", lambda: CpuLimit(1, QUOTA))
        capsys.readouterr()
        assert program(["fit", "--resume", str(folder)]) == 0
        out = capsys.readouterr().out
        assert "Threads     1 instead of 1000, the only one available now (CPU quota)\n" in out
        assert open_run(folder).recipe().train.threads == 1000

    def test_a_resumed_run_that_keeps_its_number_says_nothing(self, available, tmp_path, capsys):
        folder = tmp_path / "run"
        assert program([*FIT.split(), "--out", str(folder)]) == 0
        capsys.readouterr()
        assert program(["fit", "--resume", str(folder)]) == 0
        assert "Threads" not in capsys.readouterr().out

    def test_networks_of_a_deep_ensemble_share_the_number(self, available, measured, tmp_path):
        calls = measured(t1=[1.0], t2=[3.0])
        folder, used = tmp_path / "run", []
        arguments = f"{FIT} --set model.num_nets=2 --out {folder}".split()
        assert program(arguments) == 0
        used = [network.recipe().train.threads for network in open_run(folder).networks()]
        assert used == [1, 1]
        assert len(calls) == 1

    @pytest.mark.parametrize("number", ["fast", "1.5", "-1", "[1]", ""])
    def test_a_wrong_value_is_refused(self, capsys, number):
        assert program(["fit", f"--threads={number}"]) == 2
        assert "--threads is" in capsys.readouterr().err

    def test_auto_and_numbers_are_accepted(self):
        for value in ("auto", 0, 4):
            recipe = recipe_from_mapping({"train": {"threads": value}}, "here")
            assert recipe.train.threads == value
        with pytest.raises(InputError, match="must be an integer or 'auto'"):
            recipe_from_mapping({"train": {"threads": "all"}}, "here")
        with pytest.raises(InputError, match="must be an integer or 'auto'"):
            recipe_from_mapping({"train": {"threads": True}}, "here")
