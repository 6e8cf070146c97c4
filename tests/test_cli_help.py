"""The help of the program and of its commands."""

import pytest

from mixmo_fastai.cli import run
from mixmo_fastai.config.choices import DATASETS


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["fit", "--help"]])
def test_help_exits_without_error(arguments, capsys):
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert "Usage: mixmo" in out
    assert err == ""


@pytest.mark.parametrize("command", ["fit", "lr-find"])
def test_help_names_all_kinds_of_data_sets(command, capsys):
    assert run([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in (*DATASETS, "a folder of images", "a table of labels (CSV, TSV, ", "hf:NAME"):
        assert kind in text


def test_paragraphs_are_not_broken_where_the_source_breaks_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["import", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "compare the run with the published result." in lines
