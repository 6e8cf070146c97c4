"""Command lines in messages repeat the flags of the user."""

import shlex

from mixmo_fastai.cli import options as opt


def test_fit_command_contains_the_flags_of_the_user():
    flags = {
        "recipe": "digits/mimo",
        "arch": None,
        "batch_size": 16,
        "compiled": "off",
        "lr": 0.012,
    }
    command = opt.fit_command("my images", flags, ["optimizer.nesterov=false"])
    assert shlex.split(command) == [
        *("mixmo", "fit", "my images", "--recipe", "digits/mimo", "--batch-size", "16"),
        *("--compile", "off", "--lr", "0.012", "--set", "optimizer.nesterov=false"),
    ]
