"""Compressed messages: what arrives is near what was meant, and as small as it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.compression import Compressor

KINDS = {"top_k": {}, "random_k": {}, "sign": {}, "quantize": {"bits": 4}, "two bits": {"kind": "quantize", "bits": 2}}


def compressor(name, **more):
    return Compressor(**({"kind": name, "share": 0.05} | KINDS[name] | more))


def rows(P, seed):
    """Normal, heavy-tailed, sparse, and with many equal magnitudes."""
    x_P = torch.randn(P, generator=torch.manual_seed(seed), dtype=torch.float64)
    return [x_P, x_P**5, x_P * (x_P > 1.5), x_P.sign() * (1 + (x_P > 1).double())]


@pytest.mark.parametrize("name", KINDS)
@given(P=st.sampled_from([1, 7, 300, 5000, 20_000]), seed=st.integers(0, 3))
def test_what_arrives_is_nearer_than_nothing(name, P, seed):
    """CHOCO's condition: the mean of |Q(x) - x|^2 is below |x|^2."""
    Q = compressor(name)
    for x_P in rows(P, seed):
        errors = [(Q.row(x_P, worker, 3) - x_P).square().sum() / x_P.square().sum().clamp(min=1e-300)
                  for worker in range(8)]  # fmt: skip
        assert torch.stack(errors).mean() <= 1 + 1e-12
        assert torch.isfinite(Q.row(x_P, 0, 0)).all()


@pytest.mark.parametrize("name", ["top_k", "random_k"])
@pytest.mark.parametrize("P", [10, 4000, 50_000])
def test_as_many_floats_as_it_says_arrive(name, P):
    Q = compressor(name)
    for x_P in rows(P, 1)[:2]:
        got_P = Q.row(x_P, 2, 5)
        there = got_P.nonzero()[:, 0]
        assert len(there) == Q.sent(P) and torch.equal(got_P[there], x_P[there])
        if name == "top_k":
            left_out = x_P[got_P == 0].abs()
            assert got_P[there].abs().min() >= (left_out.max() if len(left_out) else 0)


def test_many_equal_magnitudes_are_no_more_than_it_says():
    x_P = torch.ones(50_000)
    assert int((compressor("top_k").row(x_P, 0, 0) != 0).sum()) == 2500


def test_quantized_numbers_are_right_on_average_and_few():
    x_P = torch.randn(500, generator=torch.manual_seed(0), dtype=torch.float64)
    Q = compressor("quantize")
    draws = torch.stack([Q.row(x_P, worker, r) for worker in range(40) for r in range(50)])
    shrink = 1 + min(500 / 49, 500**0.5 / 7)
    error_P = draws.mean(0) * shrink - x_P
    deviation_P = draws.std(0) * shrink / 2000**0.5
    assert (error_P.abs() < 6 * deviation_P + 1e-3).all()
    assert all(len(row.abs().unique()) <= 8 for row in draws[:5])  # a sign and three bits


def test_what_is_random_follows_from_seed_worker_and_round():
    x_P = torch.randn(1000, generator=torch.manual_seed(0))
    for name in ("random_k", "quantize"):
        one = compressor(name).row(x_P, 1, 2)
        assert torch.equal(one, compressor(name).row(x_P, 1, 2))
        for other in (compressor(name).row(x_P, 2, 2), compressor(name).row(x_P, 1, 3),
                      compressor(name, seed=1).row(x_P, 1, 2)):  # fmt: skip
            assert not torch.equal(one, other)
