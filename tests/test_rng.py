import pytest
import torch

from mixmo_fastai.rng import STREAMS, derive_seed, make_generator


def test_same_coordinates_yield_the_same_draws():
    draws = [torch.rand(5, generator=make_generator(3, "lam", 2, 7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_every_coordinate_changes_the_seed():
    base = derive_seed(1, "lam", 2, 3, 0)
    others = {
        derive_seed(2, "lam", 2, 3, 0),
        derive_seed(1, "masks", 2, 3, 0),
        derive_seed(1, "lam", 3, 3, 0),
        derive_seed(1, "lam", 2, 4, 0),
        derive_seed(1, "lam", 2, 3, 1),
    }
    assert len(others - {base}) == 5


def test_seeds_do_not_collide_in_a_long_run():
    seeds = {derive_seed(0, s, e, t) for s in STREAMS for e in range(30) for t in range(100)}
    assert len(seeds) == len(STREAMS) * 3000
    assert max(seeds) < 2**63


def test_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    torch.rand(3, generator=make_generator(0, "order"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unknown_stream_is_rejected():
    with pytest.raises(ValueError, match="'dropout'"):
        derive_seed(0, "dropout")
