from dataclasses import replace

import pytest

from mixmo_fastai.config.defaults import unmet_requirement
from mixmo_fastai.config.load import load_recipe, override, recipe_from_mapping
from mixmo_fastai.training.advice import advise, members_advice

PLAIN = recipe_from_mapping(
    {
        "data": {"dataset": "/a/folder"},
        "model": {"arch": "wrn10_2", "num_members": 1},
        "mix": {"kind": "sum", "batch_repetitions": 1},
        "train": {"epochs": 40},
    },
    "test",
)
MIXMO = override(
    PLAIN,
    [
        *("model.num_members=2", "mix.kind=cutmix", "mix.batch_repetitions=4"),
        *("model.arch=wrn10_4", "train.epochs=80"),
    ],
)

SHORT = ["mix.batch_repetitions=2", "mix.early_repetition=1", "mix.early_span=0.6"]


def history(valid_losses, accuracy=0.7, train_loss=0.8):
    return [
        {"epoch": str(n), "train_loss": str(train_loss), "valid_loss": str(loss),
         "accuracy": str(accuracy)}
        for n, loss in enumerate(valid_losses, 1)
    ]  # fmt: skip


def linear_decrease(start, end, epochs=40):
    return [start + (end - start) * n / (epochs - 1) for n in range(epochs)]


CONVERGED = [*linear_decrease(2.0, 1.0, 30), *[1.0] * 10]


def test_no_advice_for_a_high_accuracy():
    assert advise(MIXMO, history(linear_decrease(2, 0.1), accuracy=0.95), images_seen=1) is None


def test_no_advice_for_converged_curves():
    assert advise(PLAIN, history(CONVERGED), images_seen=10**6) is None


def test_decreasing_validation_loss_leads_to_more_epochs():
    advice = advise(PLAIN, history(linear_decrease(2.0, 1.0)), images_seen=10**6)
    assert "--epochs 80" in advice
    assert "still decreasing" in advice


@pytest.mark.parametrize(
    "losses",
    [
        [
            *linear_decrease(2.0, 1.0, 30),
            *linear_decrease(1.0, 0.97, 10),
        ],  # small decrease at the end of a schedule
        [*linear_decrease(2.0, 1.0, 38), 0.8, 1.1],  # the last loss is not the lowest
        [1.0],
    ],
)
def test_no_advice_for_a_small_decrease_or_an_increase(losses):
    assert advise(PLAIN, history(losses), images_seen=10**6) is None


def test_overfitting_leads_to_msda_then_weight_decay():
    rows = history(CONVERGED, train_loss=0.02)
    assert "--msda cutmix" in advise(PLAIN, rows, images_seen=10**6)
    mixed = override(PLAIN, ["mix.msda=cutmix"])
    assert "weight_decay" in advise(mixed, rows, images_seen=10**6)
    assert advise(PLAIN, history(CONVERGED, 0.9, train_loss=0.02), images_seen=10**6) is None
    assert advise(PLAIN, history(CONVERGED, train_loss=0.2), images_seen=10**6) is None


def test_too_few_images_seen_takes_precedence():
    rows = history(linear_decrease(2.0, 1.0))
    advice = advise(MIXMO, rows, images_seen=500_000)
    assert advice.startswith("Compare with --members 1, or train 2 members with --epochs 240 (")
    narrow = override(MIXMO, ["model.arch=wrn16_1"])
    assert " with --epochs 240 --arch wrn16_2 (" in advise(narrow, rows, images_seen=500_000)
    assert " with --arch wrn16_2 (" in advise(narrow, rows, images_seen=1_500_000)
    started = override(narrow, ["model.weights=run/model.safetensors"])  # of that width
    assert advise(started, rows, images_seen=300_000).endswith("early_span=0.6 (docs/recipes.md)")
    expected = "2 members need a width of 2: compare with --members 1"
    assert advise(started, rows, images_seen=1_500_000) == expected


def test_settings_for_short_trainings_need_fewer_images():
    rows = history(linear_decrease(2.0, 1.0))
    flags = "--repeat 2 --epochs 160 --set mix.early_repetition=1 --set mix.early_span=0.6"
    assert f"2 members with {flags} (" in advise(MIXMO, rows, images_seen=600_000)
    assert "mix." not in advise(MIXMO, rows, images_seen=580_000)
    recipe = override(MIXMO, SHORT)
    assert "--epochs 160 " in advise(recipe, rows, images_seen=300_000)
    recipe = override(recipe, ["train.epochs=150"])
    assert "still decreasing" in advise(recipe, rows, images_seen=600_000)
    need = unmet_requirement(MIXMO, 700_000)
    assert members_advice(MIXMO, need, 700_000) == (
        "2 members need about 1,500,000 images seen (here 700,000): --epochs 172, or "
        f"{flags}; "
        "otherwise --members 1 is often more accurate"
    )
    assert flags not in members_advice(MIXMO, need, 500_000)
    narrow = override(MIXMO, ["model.arch=wrn16_1"])
    need = unmet_requirement(narrow, 700_000)
    assert "mix." not in members_advice(narrow, need, 700_000)  # would not be enough
    assert "--epochs" not in members_advice(narrow, need, 700_000)
    twice = override(MIXMO, ["mix.batch_repetitions=2", "train.epochs=160"])
    assert "with --set mix.early" in advise(twice, rows, images_seen=600_000)


def test_too_few_views_lead_to_more_epochs():
    rows = history(linear_decrease(2.0, 1.0))
    seldom = override(MIXMO, ["train.epochs=40"])  # 160 views
    expected = "Compare with --members 1, or train 2 members with --epochs 75 (docs/recipes.md)"
    assert advise(seldom, rows, images_seen=2_000_000) == expected
    # with 700,000, the settings for short trainings would see each of 4,375 images too seldom
    assert "with --epochs 86 (" in advise(seldom, rows, images_seen=700_000)
    need = unmet_requirement(seldom, 700_000)
    assert members_advice(seldom, need, 700_000) == (
        "2 members need about 1,500,000 images seen (here 700,000): --epochs 86; "
        "otherwise --members 1 is often more accurate"
    )
    short = override(seldom, SHORT)
    need = unmet_requirement(short, 700_000)
    assert members_advice(short, need, 700_000) == (
        "2 members need about 300 views of each image (here 80): --epochs 150; "
        "otherwise --members 1 is often more accurate"
    )
    assert "with --epochs 150 (" in advise(short, rows, images_seen=700_000)


def test_advice_for_fine_tuning():
    rows = history(linear_decrease(2.0, 1.0))
    tuned = override(
        MIXMO,
        [
            *("model.pretrained=true", "model.arch=resnet18"),
            *("mix.batch_repetitions=2", "train.epochs=40"),
        ],
    )
    early = "--set mix.early_repetition=1 --set mix.early_span=0.6"  # 80 views of 1,000 images
    assert f"2 members with {early} (" in advise(tuned, rows, images_seen=80_000)
    longer = advise(tuned, rows, images_seen=40_000)  # of 500 images
    assert f"2 members with --epochs 60 {early} (" in longer
    short = override(tuned, ["mix.early_repetition=1", "mix.early_span=0.6"])
    assert "--epochs 60 (" in advise(short, rows, images_seen=40_000)
    assert "still decreasing" in advise(short, rows, images_seen=80_000)


def test_too_few_images_lead_to_one_member():
    rows = history(linear_decrease(2.0, 1.0))
    seldom = override(MIXMO, ["train.epochs=40"])
    need = unmet_requirement(seldom, 199_000)  # 1,206 views
    assert "--epochs" not in members_advice(seldom, need, 199_000)
    assert "--epochs 300 " in advise(seldom, rows, images_seen=200_000)  # 1,200 views per image
    # 1,243 images would be seen more often, but not with the settings for short trainings
    flags = "--repeat 2 --epochs 242 --set mix.early_repetition=1 --set mix.early_span=0.6"
    assert f"2 members with {flags} (" in advise(seldom, rows, images_seen=199_000)
    assert f" {flags.replace('242', '600')} (" in advise(seldom, rows, images_seen=80_000)
    for settings, images_seen in (
        ([], 79_000),
        (SHORT, 39_000),
    ):
        advice = advise(override(seldom, settings), rows, images_seen=images_seen)
        assert advice == "2 members need more training images: use --members 1"


def test_advice_names_the_recipe_for_one_member():
    rows = history(linear_decrease(2.0, 1.0))
    for name, other in (
        ("small-cifar10/cut-mixmo", "small-cifar10/mixup"),
        ("fine-tune/cut-mixmo", "fine-tune/vanilla"),
    ):
        recipe = replace(MIXMO, name=name)
        assert f"Compare with --members 1 (or --recipe {other}), or" in advise(
            recipe, rows, 700_000
        )
        advice = members_advice(recipe, unmet_requirement(recipe, 700_000), 700_000)
        assert advice.endswith(
            f"otherwise --members 1 (or --recipe {other}) is often more accurate"
        )
        assert load_recipe(other).model.num_members == 1


def test_no_advice_about_members_after_enough_images_seen():
    rows = history(linear_decrease(2.0, 1.0))
    advice = advise(MIXMO, rows, images_seen=1_500_000)
    assert "train longer, e.g. --epochs 160" in advice


def test_advice_is_one_line():
    for rows in (history(linear_decrease(2, 1)), history(CONVERGED, train_loss=0)):
        for recipe in (PLAIN, MIXMO):
            for seen in (1, 10**8):
                assert len((advise(recipe, rows, seen) or "").splitlines()) <= 1


def test_no_advice_without_validation():
    rows = [{"epoch": "1", "train_loss": "0.01", "valid_loss": "", "accuracy": ""}]
    assert advise(PLAIN, rows, images_seen=1) is None
    assert advise(PLAIN, [], images_seen=1) is None
