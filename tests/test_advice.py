import pytest

from mixmo_fastai.config.load import override, recipe_from_mapping
from mixmo_fastai.training.advice import advise

PLAIN = recipe_from_mapping(
    {
        "data": {"dataset": "/a/folder"},
        "model": {"arch": "wrn10_2", "num_members": 1},
        "mix": {"kind": "sum", "batch_repetitions": 1},
        "train": {"epochs": 40},
    },
    "here",
)
MIXMO = override(
    PLAIN,
    ["model.num_members=2", "mix.kind=cutmix", "mix.batch_repetitions=4", "model.arch=wrn10_4"],
)


def history(valid_losses, accuracy=0.7, train_loss=0.8):
    return [
        {"epoch": str(n), "train_loss": str(train_loss), "valid_loss": str(loss),
         "accuracy": str(accuracy)}
        for n, loss in enumerate(valid_losses, 1)
    ]  # fmt: skip


def falling(start, end, epochs=40):
    return [start + (end - start) * n / (epochs - 1) for n in range(epochs)]


SETTLED = [*falling(2.0, 1.0, 30), *[1.0] * 10]


def test_a_good_network_needs_no_advice():
    assert advise(MIXMO, history(falling(2, 0.1), accuracy=0.95), images_seen=1) is None


def test_settled_curves_need_no_advice():
    assert advise(PLAIN, history(SETTLED), images_seen=10**6) is None


def test_a_falling_validation_loss_calls_for_more_epochs():
    advice = advise(PLAIN, history(falling(2.0, 1.0)), images_seen=10**6)
    assert "--epochs 80" in advice
    assert "still decreasing" in advice


@pytest.mark.parametrize(
    "losses",
    [
        [*falling(2.0, 1.0, 30), *falling(1.0, 0.97, 10)],  # as any schedule does at its end
        [*falling(2.0, 1.0, 38), 0.8, 1.1],  # the last is not the lowest
        [1.0],
    ],
)
def test_a_little_fall_or_a_rise_does_not(losses):
    assert advise(PLAIN, history(losses), images_seen=10**6) is None


def test_overfitting_calls_for_images_and_mixing():
    rows = history(SETTLED, train_loss=0.02)
    assert "--msda cutmix" in advise(PLAIN, rows, images_seen=10**6)
    mixed = override(PLAIN, ["mix.msda=cutmix"])
    assert "weight_decay" in advise(mixed, rows, images_seen=10**6)
    assert advise(PLAIN, history(SETTLED, 0.9, train_loss=0.02), images_seen=10**6) is None
    assert advise(PLAIN, history(SETTLED, train_loss=0.2), images_seen=10**6) is None


def test_too_small_a_training_comes_first_and_names_the_alternative():
    rows = history(falling(2.0, 1.0))
    advice = advise(MIXMO, rows, images_seen=300_000)
    assert advice.startswith("Compare with --members 1, or train 2 members with --epochs 200 (")
    narrow = override(MIXMO, ["model.arch=wrn16_2"])
    assert " with --epochs 200 --arch wrn16_4 (" in advise(narrow, rows, images_seen=300_000)
    assert " with --arch wrn16_4 (" in advise(narrow, rows, images_seen=1_500_000)


def test_few_images_cannot_be_seen_often_enough():
    rows = history(falling(2.0, 1.0))
    assert "--epochs 300 " in advise(MIXMO, rows, images_seen=200_000)  # 1,200 views of an image
    advice = advise(MIXMO, rows, images_seen=199_000)
    assert advice == "2 members need more training images: use --members 1"


def test_no_advice_on_members_with_enough_images_seen():
    rows = history(falling(2.0, 1.0))
    assert "--epochs 80" in advise(MIXMO, rows, images_seen=1_500_000)


def test_advice_is_one_line():
    for rows in (history(falling(2, 1)), history(SETTLED, train_loss=0)):
        for recipe in (PLAIN, MIXMO):
            for seen in (1, 10**8):
                assert len((advise(recipe, rows, seen) or "").splitlines()) <= 1


def test_without_validation_there_is_none():
    rows = [{"epoch": "1", "train_loss": "0.01", "valid_loss": "", "accuracy": ""}]
    assert advise(PLAIN, rows, images_seen=1) is None
    assert advise(PLAIN, [], images_seen=1) is None
