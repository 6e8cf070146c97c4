"""Splits of training data: validation images, limits and subsets."""

import pytest
import torch
from datasets import write_image_folder
from synthetic import source

from mixmo_fastai.data.dataloaders import make_dataloaders
from mixmo_fastai.data.image_folder import read_image_folder
from mixmo_fastai.data.splits import limit_images, split_validation
from mixmo_fastai.errors import InputError


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
