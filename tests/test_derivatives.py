"""Hessian-vector products in forward mode: for every network what the double backward gives, or not used."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from networks import load_model
from tests.runs import digits_job, recorded
from utils.registry import NETWORKS

SHAPE = (1, 8, 8)


def adjoints(run):
    """``step_adjoint`` at the run's start along random directions, in the way chosen by itself and in both."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = run.fleet.rows_RD
    adjoint_ND = torch.randn(rows_ND.shape, generator=generator, dtype=rows_ND.dtype)
    both = (run.derivatives._by_forward_mode, run.derivatives._by_double_backward)

    def adjoint():
        return run.step_adjoint(0, rows_ND, adjoint_ND[:, : run.P], adjoint_ND[:, run.P :])

    results = [adjoint()]
    chosen = run.derivatives._product
    for run.derivatives._product in both:
        results.append(adjoint())
    return chosen, results


SLOW = [n for n in NETWORKS if n.startswith(("resnet", "densenet"))]
FOR_PICTURES = [n for n in NETWORKS if n not in SLOW and not n.startswith(("lstm", "gru"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_PICTURES + [pytest.param(n, marks=pytest.mark.slow) for n in SLOW])
def test_forward_mode_is_the_double_backward(name):
    network = load_model(name, 10, SHAPE, seed=0).double()
    vmapped = name.startswith("mlp")
    job = digits_job(network, engine="vmap" if vmapped else "threads", num_workers=2, max_train=40, batch_size=4)
    run = recorded(job)
    chosen, (own, forward, double) = adjoints(run)
    assert chosen == run.derivatives._by_forward_mode
    for other in (own, double):
        torch.testing.assert_close(forward.rows_ND, other.rows_ND, rtol=1e-6, atol=1e-8 * other.rows_ND.abs().max())
        torch.testing.assert_close(forward.products_NB, other.products_NB, rtol=1e-7, atol=1e-11)


def test_a_network_whose_forward_mode_cannot_be_differentiated_falls_back():
    """PyTorch's forward-mode rule of LayerNorm takes its statistics for constants of a further derivative."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 10)).double()
    run = recorded(digits_job(network, num_workers=2, max_train=40))
    chosen, (own, forward, double) = adjoints(run)
    assert chosen == run.derivatives._by_double_backward
    assert torch.equal(own.rows_ND, double.rows_ND)
    if torch.allclose(forward.rows_ND, double.rows_ND):
        pytest.fail("PyTorch has mended LayerNorm's rule: this test needs another layer")


def test_tangents_share_one_copy_of_the_direction():
    """Else make_dual fills zeros of the size of all workers' rows for every single tensor."""
    run = recorded(digits_job(model="cnn", num_workers=3, max_train=60))
    rows_nD = run.fleet.rows_RD[1:2]
    with forward_ad.dual_level():
        _, duals = run.derivatives._duals(rows_nD, torch.ones_like(rows_nD[:, : run.P]), gradients=True)
        tangents = [forward_ad.unpack_dual(d).tangent for d in duals]
        assert len({t.untyped_storage().data_ptr() for t in tangents}) == 1


@pytest.mark.parametrize("engine", ["threads", "vmap"])
def test_group_norm_has_its_derivatives_in_every_layout(engine):
    """PyTorch's forward-mode rule raises in channels_last; with it `delete` and `dice` ended in a traceback."""
    found = []
    for channels_last in (False, True):
        job = digits_job(model="cnn_group", engine=engine, channels_last=channels_last, num_workers=2, max_train=40)
        run = recorded(job)
        rows_ND = run.final()
        direction_NP = torch.linspace(-1, 1, run.P, dtype=rows_ND.dtype).expand(2, -1)
        canonical_ND = run.fleet.layout.from_canonical(direction_NP.contiguous())
        found.append(run.sample_products(rows_ND, canonical_ND))
        chosen, (own, forward, double) = adjoints(run)
        assert chosen == run.derivatives._by_forward_mode
        torch.testing.assert_close(forward.rows_ND, double.rows_ND, rtol=1e-6, atol=1e-8 * own.rows_ND.abs().max())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
