"""Command lines that messages print are the ones that were given."""

import shlex

from mixmo_fastai.cli import options as opt


def test_the_command_of_fit_has_the_given_flags_in_quotes():
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
