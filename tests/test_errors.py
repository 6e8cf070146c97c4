"""Checks of arguments."""

import numpy as np
import pytest

from mixmo_fastai.errors import InputError, check_count, check_fraction, nearest


@pytest.mark.parametrize("value", [1, 7, np.int64(2)])
def test_counts_are_accepted(value):
    check_count("num_members", value)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, float("nan")])
def test_other_values_are_no_counts(value):
    with pytest.raises(InputError, match="num_members must be an integer, 1 or more; got"):
        check_count("num_members", value)


def test_counts_have_a_minimum():
    check_count("group_size", 2, minimum=2)
    with pytest.raises(InputError, match="group_size must be an integer, 2 or more; got 1"):
        check_count("group_size", 1, minimum=2)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25)])
def test_fractions_are_accepted(value):
    check_fraction("mix_prob", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_other_values_are_no_fractions(value):
    with pytest.raises(InputError, match="mix_prob must be from 0 to 1; got"):
        check_fraction("mix_prob", value)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("early_rep", "early_repetition"),
        ("early", "early_span"),
        ("mix", "mix_prob"),
        ("spann", None),
        ("gpu", None),
    ],
)
def test_shortened_names_stand_for_the_only_choice_that_begins_so(name, choice):
    names = ["early_span", "early_repetition", "mix_prob"]
    assert nearest(name, names, shortened=True) == choice
    assert nearest("gpu", ["auto", "cpu", "cuda"], shortened=True) == "cuda"
    assert nearest("new", ["newfoundland"]) is None  # which nobody misspelt


def test_one_can_be_excluded():
    check_fraction("decay", 0.999, below_one=True)
    with pytest.raises(InputError, match="decay must be at least 0 and below 1; got 1"):
        check_fraction("decay", 1, below_one=True)
