import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback
from synthetic import mixmo_dls
from torch import nn

from mixmo_fastai.cli import run as program
from mixmo_fastai.config.recipe import Recipe
from mixmo_fastai.errors import InputError
from mixmo_fastai.learner.build import mixmo_learner
from mixmo_fastai.mixing import draw_lam, draw_masks
from mixmo_fastai.models import create_model
from mixmo_fastai.models.flops import count_flops, training_flops
from mixmo_fastai.runtime import acceleration
from mixmo_fastai.runtime.acceleration import Acceleration, choose_acceleration
from mixmo_fastai.runtime.cpus import CpuLimit
from mixmo_fastai.runtime.devices import float32_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def batch(model, size=4):
    lam = draw_lam(size, 2, 2.0)
    masks, _ = draw_masks("cutmix", lam, model.mask_shape(8, 8))
    return torch.randn(size, 2, 3, 8, 8), masks


def train_learner(accel, **settings):
    learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0, **settings)
    accel.move_to_device(learn.model)
    with accel.applied(learn.model), learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return learn


def find_backend(name):
    backend = torch.backends
    for part in filter(None, name.split(".")):
        backend = getattr(backend, part)
    return backend


class TestTraining:
    """All settings train the same network up to rounding."""

    @pytest.mark.slow
    def test_threads_and_memory_format_change_only_rounding(self):
        plain = train_learner(Acceleration(CPU, channels_last=False)).model.state_dict()
        for accel in (Acceleration(CPU), Acceleration(CPU, threads=2)):
            other = train_learner(accel).model.state_dict()
            for name, value in plain.items():
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)

    def test_bfloat16_trains_close_to_float32(self):
        plain, rounded = (
            train_learner(Acceleration(CPU)),
            train_learner(Acceleration(CPU, torch.bfloat16)),
        )
        losses = [torch.stack(learn.recorder.losses) for learn in (plain, rounded)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.05)
        assert not torch.equal(*losses)
        assert all(p.dtype == torch.float32 for p in rounded.model.parameters())

    @pytest.mark.slow
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_compiled_training_matches_eager_training(self, autocast, monkeypatch):
        """Use the backend aot_eager, which generates no code, for speed."""
        real, calls = torch.compile, []

        def traced(function, **settings):
            calls.append(settings)
            return real(function, backend="aot_eager", **settings)

        monkeypatch.setattr(torch, "compile", traced)
        torch._dynamo.reset()
        plain = train_learner(Acceleration(CPU, autocast))
        compiled = train_learner(Acceleration(CPU, autocast, compiled=True))
        assert calls == [{"dynamic": False}]
        tolerance = 1e-5 if autocast is None else 0.02
        torch.testing.assert_close(
            torch.stack(compiled.recorder.losses),
            torch.stack(plain.recorder.losses),
            rtol=tolerance,
            atol=tolerance,
        )
        assert not any(key.startswith("_orig_mod") for key in compiled.model.state_dict())

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
    def test_compiled_step_matches_eager_step(self):
        torch._dynamo.reset()
        model = create_model("wrn10_1", 3, 2)
        eager = copy.deepcopy(model)
        inputs, masks = batch(model)
        with Acceleration(CPU, compiled=True).applied(model):
            actual = model(inputs, masks)
            actual.square().sum().backward()
        expected = eager(inputs, masks)
        expected.square().sum().backward()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for compiled_p, eager_p in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(compiled_p.grad, eager_p.grad, rtol=1e-3, atol=1e-3)


class TestCleanup:
    def test_error_restores_threads_autocast_and_forward(self):
        class Fails(Callback):
            def after_pred(self):
                assert self.learn.pred.dtype == torch.float32
                assert not torch.is_autocast_enabled("cpu")
                raise MemoryError("out of memory")

        threads = torch.get_num_threads()
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", cbs=Fails())
        accel = Acceleration(CPU, torch.bfloat16, threads=threads + 1)
        with pytest.raises(MemoryError), accel.applied(learn.model), learn.no_bar():
            learn.fit(1, 1e-3)
        assert torch.get_num_threads() == threads
        assert not torch.is_autocast_enabled("cpu")
        assert "forward" not in vars(learn.model)

    def test_error_in_the_forward_pass_ends_autocast(self):
        model = create_model("wrn10_1", 3, 2)
        inputs, masks = batch(model)
        seen = []

        def fail(*_):
            seen.append(torch.is_autocast_enabled("cpu"))
            raise RuntimeError("failed")

        model.core.register_forward_hook(fail)
        with (
            pytest.raises(RuntimeError, match="failed"),
            Acceleration(CPU, torch.bfloat16).applied(model),
        ):
            model(inputs, masks)
        assert seen == [True]
        assert not torch.is_autocast_enabled("cpu")

    def test_autocast_of_the_caller_is_kept(self):
        seen = []
        model = create_model("wrn10_1", 3, 2)
        model.core.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        with (
            torch.autocast("cpu", torch.bfloat16),
            Acceleration(CPU, channels_last=False).applied(model),
        ):
            model(torch.randn(2, 3, 8, 8))
        assert seen == [True]

    @pytest.mark.parametrize("tf32", [True, False])
    def test_float32_precision_is_restored(self, tf32):
        cudnn = torch.backends.cudnn
        before = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
        with float32_precision(tf32=tf32, autotune=True):
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert cudnn.benchmark
            assert cudnn.allow_tf32 == tf32
        after = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
        assert after == before

    @pytest.mark.parametrize("tf32", [True, False])
    @pytest.mark.parametrize("value", ["ieee", "tf32"])
    @pytest.mark.parametrize("name", ["", "cudnn.conv", "cuda.matmul"])
    def test_newer_precision_settings_of_torch_are_restored(self, tf32, value, name):
        """Torch has an older and a newer precision setting, and refuses to mix them."""
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("this version of torch has only the older setting")
        names = ("", "cudnn", "cudnn.conv", "cuda.matmul", "mkldnn.matmul", "mkldnn.conv")
        backends = {key: find_backend(key) for key in names}
        original = {key: backend.fp32_precision for key, backend in backends.items()}
        try:
            backends[name].fp32_precision = value
            before = {key: backend.fp32_precision for key, backend in backends.items()}
            with float32_precision(tf32=tf32, autotune=True):
                inside = tuple(
                    backends[key].fp32_precision for key in ("cudnn.conv", "cuda.matmul")
                )
                assert (inside == ("tf32", "tf32")) == tf32
                assert "tf32" in inside or not tf32
                assert torch.backends.cudnn.benchmark
            assert {key: backend.fp32_precision for key, backend in backends.items()} == before
            assert not torch.backends.cudnn.benchmark
        finally:
            for key, backend in backends.items():
                backend.fp32_precision = original[key]

    def test_copies_use_their_own_weights(self):
        model = create_model("wrn10_1", 3, 2)
        x = torch.randn(2, 3, 8, 8)
        with Acceleration(CPU, torch.bfloat16).applied(model.eval()):
            copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            for other in (copied, unpickled):
                for head in other.heads:
                    nn.init.zeros_(head.weight)
                assert not other(x).any()
            assert model(x).any()

    def test_contexts_can_be_nested(self):
        model = create_model("wrn10_1", 3, 2).eval()
        x, seen = torch.randn(2, 3, 8, 8), []
        model.core.register_forward_hook(
            lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_num_threads()))
        )
        threads = torch.get_num_threads()
        with Acceleration(CPU, torch.bfloat16).applied(model):
            with Acceleration(CPU, channels_last=False, threads=threads + 1).applied(model):
                model(x)
            model(x)
        model(x)
        # The inner context keeps the autocast of the outer context.
        assert seen == [(True, threads + 1), (True, threads), (False, threads)]

    def test_custom_forward_of_the_network_is_kept(self):
        model = create_model("wrn10_1", 3, 2).eval()
        model.forward = custom_forward = lambda x, masks=None: x + 1
        with Acceleration(CPU, torch.bfloat16).applied(model):
            assert model(torch.ones(1, 3, 8, 8)).eq(2).all()
        assert vars(model)["forward"] is custom_forward

    def test_evaluation_is_not_compiled(self, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("compiled")

        monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
        model = create_model("wrn10_1", 3, 2).eval()
        with Acceleration(CPU, compiled=True).applied(model):
            model(torch.randn(2, 3, 8, 8))
            with pytest.raises(AssertionError, match="compiled"):
                model(*batch(model))


class TestMemoryFormat:
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_encoders_receive_the_requested_memory_format(self, channels_last):
        seen = []
        learn = mixmo_learner(mixmo_dls(), "wrn10_1", seed=0)
        accel = Acceleration(CPU, channels_last=channels_last)
        accel.move_to_device(learn.model)
        for encoder in learn.model.encoders:
            encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with accel.applied(learn.model), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert len(seen) > 4
        assert all(x.is_contiguous(memory_format=memory_format) for x in seen)
        weight = learn.model.core.groups[0][0].conv1.weight
        assert weight.is_contiguous(memory_format=memory_format)

    def test_masks_of_all_kinds_have_equal_strides(self, monkeypatch):
        strides = set()

        def compiled(function, **_):
            def run(network, inputs, masks):
                strides.add(masks.stride())
                return function(network, inputs, masks)

            return run

        monkeypatch.setattr(torch, "compile", compiled)
        train_learner(Acceleration(CPU, compiled=True), mix_prob=0.5, batch_repetitions=1)
        assert len(strides) == 1


class TestChooseAcceleration:
    @staticmethod
    def choose(device, num_images=1000, **settings):
        recipe = Recipe()
        recipe = replace(recipe, train=replace(recipe.train, **settings))
        model = create_model("wrn10_1", 3, 2)
        return choose_acceleration(recipe, device, model, (3, 32, 32), num_images)

    @pytest.fixture(autouse=True)
    def simulated_gpu(self, monkeypatch, tmp_path):
        """Simulate a GPU, with or without bfloat16, and everything that compiling needs."""
        monkeypatch.setattr(acceleration, "thread_limit", lambda: CpuLimit(2))
        self.has_bfloat16, self.capability = True, (9, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)
        monkeypatch.setattr(acceleration, "find_spec", lambda _: "found")
        monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
        (tmp_path / "Python.h").touch()
        monkeypatch.setattr(acceleration.sysconfig, "get_path", lambda _: str(tmp_path))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: self.has_bfloat16
        )

    def test_precision_on_a_gpu_depends_on_its_capability(self):
        assert self.choose(CUDA).describe() == "bfloat16, channels last, 2 threads"
        self.has_bfloat16 = False
        assert self.choose(CUDA).describe() == "TF32, channels last, 2 threads"
        with pytest.raises(InputError, match="--precision float32"):
            self.choose(CUDA, precision="bfloat16")
        self.capability = (7, 5)
        assert self.choose(CUDA).describe() == "float32, channels last, 2 threads"
        with pytest.raises(InputError, match="--precision float32"):
            self.choose(CUDA, precision="tf32")

    def test_cpu_uses_float32_by_default(self):
        assert self.choose(CPU).describe() == "float32, channels last, 2 threads"
        assert self.choose(CPU, precision="bfloat16").autocast == torch.bfloat16
        with pytest.raises(InputError, match="--precision float32"):
            self.choose(CPU, precision="tf32")

    def test_all_settings_can_be_set(self):
        accel = self.choose(
            CUDA, precision="float32", memory_format="contiguous", compile="on", threads=3
        )
        assert accel.describe() == "float32, compiled, 3 threads"
        assert not accel.tf32

    @pytest.mark.parametrize("flops", [1.0, 1e12], ids=["small network", "wide network"])
    def test_only_long_training_is_compiled(self, monkeypatch, flops):
        monkeypatch.setattr(acceleration, "training_flops", lambda *args: flops * args[-1])
        seconds_per_image = max(
            flops / acceleration.MAX_FLOPS, 1 / acceleration.MAX_IMAGES_PER_SECOND
        )
        min_images = acceleration.MIN_COMPILED_SECONDS / seconds_per_image
        assert not self.choose(CUDA, int(min_images) - 1).compiled
        assert self.choose(CUDA, int(min_images) + 1).compiled
        assert not self.choose(CUDA, int(min_images) + 1, compile="off").compiled
        assert not self.choose(CPU, int(min_images) + 1).compiled

    def test_a_network_whose_operations_cannot_be_counted_is_compiled_by_its_images(
        self, monkeypatch
    ):
        def refuse(*_):
            raise NotImplementedError("no meta kernel")

        monkeypatch.setattr(acceleration, "training_flops", refuse)
        num_images = acceleration.MIN_COMPILED_SECONDS * acceleration.MAX_IMAGES_PER_SECOND
        assert self.choose(CUDA, int(num_images) + 1).compiled
        assert not self.choose(CUDA, int(num_images) - 1).compiled

    @pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
    def test_compile_on_requires_a_compiler(self, monkeypatch, device):
        assert self.choose(device, compile="on").compiled
        monkeypatch.setattr(acceleration.shutil, "which", lambda _: None)
        with pytest.raises(InputError, match="--compile on needs"):
            self.choose(device, compile="on")

    def test_too_many_threads_are_refused(self):
        with pytest.raises(InputError, match="1000 threads are too many"):
            self.choose(CPU, threads=1000)

    @pytest.mark.parametrize("missing", ["triton", "compiler", "headers", "capability"])
    def test_compile_auto_requires_everything_that_compiling_needs(self, monkeypatch, missing):
        if missing == "triton":
            monkeypatch.setattr(acceleration, "find_spec", lambda _: None)
        elif missing == "compiler":
            monkeypatch.setattr(acceleration.shutil, "which", lambda _: None)
        elif missing == "headers":
            monkeypatch.setattr(acceleration.sysconfig, "get_path", lambda _: "/nowhere")
        else:
            self.capability = (6, 1)
        assert not self.choose(CUDA, 10**15).compiled
        if missing != "compiler":  # an explicit request requires only a compiler
            assert self.choose(CUDA, 10**15, compile="on").compiled


def test_flops_count_multiplications_and_additions():
    """WRN-10-1 at 8x8, by hand: 2 · (kernel · inputs · outputs · positions) per convolution."""
    convolutions = [
        (27, 16, 64), (27, 16, 64),  # two encoders
        (144, 16, 64), (144, 16, 64),
        (144, 32, 64), (288, 32, 16), (16, 32, 16),
        (288, 64, 16), (576, 64, 4), (32, 64, 4),
    ]  # fmt: skip
    heads = 2 * 2 * 64 * 5
    expected = sum(2 * fan_in * out * positions for fan_in, out, positions in convolutions) + heads
    model = create_model("wrn10_1", 5, 2)
    assert count_flops(model, (3, 8, 8)) == expected
    assert training_flops(model, (3, 8, 8), 10) == 30 * expected
    assert count_flops(model.fuse(), (3, 8, 8)) < expected


def test_acceleration_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--precision", "bfloat16", "--memory-format", "contiguous", "--threads", "1"]
    flags += ["--compile", "off", "--arch", "wrn10_1", "--epochs", "1", "--limit", "200"]
    assert program(["fit", *flags, "--out", "run"]) == 0
    assert "cpu, bfloat16, 1 thread, seed 0" in capsys.readouterr().out
    assert program(["fit", "--compile", "maybe"]) == 2
    assert "--compile is 'maybe'" in capsys.readouterr().err
    assert program(["fit", "--memory-format", "channels"]) == 2
    assert "channels-last" in capsys.readouterr().err
