"""Splits of training data: validation images, limits and subsets."""

import pytest
import torch
from small_data import write_image_folder
from synthetic import source

from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.image_sets import ArrayImages
from mixmo_fastai.data.splits import draw_groups, limit_images, split_validation
from mixmo_fastai.errors import InputError
from mixmo_fastai.rng import make_generator


class TestSplits:
    def test_validation_takes_the_same_share_of_every_class(self):
        data = source(num_train=300)
        train, valid = split_validation(data.train, 0.2)
        assert valid.labels.bincount().tolist() == [20, 20, 20]
        assert sorted([*train.indices.tolist(), *valid.indices.tolist()]) == list(range(300))
        assert torch.equal(valid.tensor(), data.train.tensor()[valid.indices])

    def test_the_split_is_the_same_for_every_run(self):
        first, second = (split_validation(source().train, 0.2)[1].indices for _ in "ab")
        assert torch.equal(first, second)

    def test_nothing_is_set_aside_by_a_share_of_zero(self):
        data = source()
        train, valid = split_validation(data.train, 0)
        assert train is data.train
        assert len(valid) == 0

    @pytest.mark.parametrize(("num_train", "expected"), [(60, 12), (900, 99), (5100, 102)])
    def test_without_a_share_it_follows_from_the_number_of_images(self, num_train, expected):
        data = source(num_train=num_train)  # three classes
        _, valid = split_validation(data.train, None)
        assert valid.labels.bincount().tolist() == [expected // 3] * 3
        assert len(make_dataloaders(data, batch_size=8, device="cpu").valid.images) == expected

    def test_a_class_of_one_image_keeps_it_for_training(self):
        data = source(num_train=4)  # labels 0 1 2 0
        train, valid = split_validation(data.train, 0.5)
        assert sorted(train.labels.tolist()) == [0, 1, 2]
        assert valid.labels.tolist() == [0]

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_shares_out_of_range(self, share):
        with pytest.raises(InputError, match="valid_split"):
            split_validation(source().train, share)

    @pytest.mark.parametrize(("limit", "counts"), [(30, [10, 10, 10]), (31, [11, 10, 10])])
    def test_a_limit_is_balanced(self, limit, counts):
        limited = limit_images(source().train, limit)
        assert sorted(limited.labels.bincount().tolist(), reverse=True) == counts

    def test_no_limit(self):
        data = source()
        assert limit_images(data.train, 0) is data.train
        assert limit_images(data.train, 1000) is data.train


class TestSubsets:
    def test_only_the_chosen_files_are_decoded(self, tmp_path, monkeypatch):
        folder = write_image_folder(tmp_path / "images", num_train=20)
        images = read_image_folder(folder, tmp_path, cache_limit=0).train
        decoded = []
        monkeypatch.setattr(
            "mixmo_fastai.data.decoding.decode_image",
            lambda path, *_: decoded.append(path) or torch.zeros(3, 32, 32, dtype=torch.uint8),
        )
        limited = limit_images(split_validation(images, 0.1)[0], 6)
        assert limited.tensor().shape == (6, 3, 32, 32)
        assert len(decoded) == 6

    def test_a_subset_of_a_subset(self):
        data = source()
        train, _ = split_validation(data.train, 0.2)
        limited = limit_images(train, 9)
        whole = train.indices[limited.indices]
        assert torch.equal(limited.tensor(), data.train.tensor()[whole])


class TestGroups:
    """Drawing whole groups."""

    @staticmethod
    def draw(seed, num_groups=60, num_classes=4, mixed=True):
        random = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 9, (num_groups,), generator=random)
        groups = torch.arange(num_groups).repeat_interleave(sizes)
        labels = torch.randint(num_classes, (len(groups),), generator=random)
        if not mixed:  # each group has one class, as a patient has one diagnosis
            labels = (groups * 7) % num_classes
        order = torch.randperm(len(groups), generator=random)
        return labels[order], groups[order] * 5 + 3

    @pytest.mark.parametrize("mixed", [True, False])
    @pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
    @pytest.mark.parametrize("seed", range(3))
    def test_fractions_of_classes_are_close_and_groups_whole(self, seed, fraction, mixed):
        labels, groups = self.draw(seed, mixed=mixed)
        drawn = draw_groups(labels, groups, fraction, "split")
        assert not set(groups[drawn].tolist()) & set(groups[~drawn].tolist())
        totals = labels.bincount()
        reached = labels[drawn].bincount(minlength=4) / totals
        # No class is off by much more than one group of eight images.
        assert ((reached - fraction).abs() * totals).max() <= 10
        assert (labels[~drawn].bincount(minlength=4) > 0).all()
        assert torch.equal(drawn, draw_groups(labels, groups, fraction, "split"))

    def test_choice_matches_a_slow_search(self):
        """Each step adds the next group if this lowers the sum of squared deviations."""
        labels, groups = self.draw(5, num_groups=20)
        actual = draw_groups(labels, groups, 0.3, "test split")
        names = sorted(set(groups.tolist()))
        generator = make_generator(0, "test split")
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        chosen = []

        def deviation(chosen):
            total = 0.0
            for label in range(4):
                count = (labels == label).sum().item()
                held = sum(((labels == label) & (groups == name)).sum().item() for name in chosen)
                total += (held / count - 0.3) ** 2
            return total

        for name in order:
            left = {
                label.item()
                for g, label in zip(groups, labels, strict=True)
                if g not in [*chosen, name]
            }
            if left == {0, 1, 2, 3} and deviation([*chosen, name]) < deviation(chosen):
                chosen.append(name)
        assert set(groups[actual].tolist()) == set(chosen)

    def test_small_groups_are_drawn_as_large_ones_are(self):
        sizes = torch.tensor([50] * 5 + [2] * 200)
        groups = torch.arange(len(sizes)).repeat_interleave(sizes)
        labels = torch.arange(len(groups)) % 2
        drawn = groups[draw_groups(labels, groups, 0.2, "split")].unique()
        assert 20 <= (drawn >= 5).sum() <= 65

    def test_one_group_is_drawn_at_least_if_possible(self):
        labels = torch.tensor([0, 1] * 20)
        groups = torch.arange(40) // 20  # two groups of ten images of each class
        assert draw_groups(labels, groups, 0.02, "split").sum() == 20
        everything = draw_groups(labels, torch.zeros(40, dtype=torch.int64), 0.5, "split")
        assert not everything.any()

    def test_split_that_no_group_allows_is_refused(self):
        images = ArrayImages(
            torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
            torch.tensor([0, 0, 1, 1]),
            tuple("abcd"),
            groups=torch.tensor([0, 0, 1, 1]),
        )
        with pytest.raises(InputError, match="selects none of the 2 groups"):
            split_validation(images, 0.5)
