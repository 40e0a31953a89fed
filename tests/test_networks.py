"""Every network at every supported size; seeds; the cut at the head; double backward."""


import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from networks import (
    features,
    head,
    load_model,
)
from networks.cnn import smooth_variant
from networks.mlp import mlp
from networks.recurrent import Recurrent
from utils.errors import UsageError
from utils.registry import NETWORKS

SMALL = ["squeezenet", "shufflenet", "cnn", "cnn_smooth", "mlp", "mlp_smooth"]  # milliseconds, not seconds
SLOW = ("resnet34", "resnet50", "densenet121")
WITH_SLOW_RESNETS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    state_a, state_b = a.state_dict(), b.state_dict()
    return state_a.keys() == state_b.keys() and all(torch.equal(state_a[key], state_b[key]) for key in state_a)


# Building ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (1, 8, 8), 64 * 64 + 64 + 64 * 10 + 10),
        ("mlp_smooth", (1, 8, 8), 64 * 64 + 64 + 64 * 10 + 10),
        ("mlp_deep", (1, 8, 8), 999 * (64 * 64 + 64) + 64 * 10 + 10),
        ("cnn", (3, 32, 32), 896 + 18_496 + 262_208 + 650),
        ("cnn_smooth", (3, 32, 32), 282_250),
        ("cnn", (1, 8, 8), 320 + 18_496 + 256 * 64 + 64 + 650),
        ("squeezenet", (3, 32, 32), 722_496 + 5_130),  # torchvision's without classifier, and the head
        ("shufflenet", (3, 32, 32), 1_253_604 + 10_250),
        ("resnet18", (3, 32, 32), 11_689_512 - 513_000 + 5_130 - 64 * 3 * (49 - 9)),
        ("resnet34", (3, 96, 96), 21_797_672 - 513_000 + 5_130),
        ("resnet50", (3, 96, 96), 25_557_032 - 2_049_000 + 20_490),
    ],
)
def test_parameter_counts(name, shape, parameters):
    assert sum(p.numel() for p in load_model(name, 10, shape, seed=0).parameters()) == parameters


SEQUENCES = ("lstm", "lstm_mean", "gru")


def some_inputs(name, count, shape, **options):
    """Random pictures of a shape, or for networks that take no others sequences of 6 steps."""
    if name not in SEQUENCES:
        return torch.rand(count, *shape, **options)
    sequences = torch.rand(count, 6, 5, **options)
    sequences[..., -1] = 1.0
    return sequences


@pytest.mark.parametrize("name", WITH_SLOW_RESNETS)
def test_every_size_gives_logits_and_the_head_maps_features_to_them(name):
    sizes = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)] + [(3, 96, 96)] * (name in SMALL)
    sizes = sizes if name in SMALL or name == "resnet18" else [(1, 8, 8), (3, 32, 32)]
    for shape in [(6, 5)] if name in SEQUENCES else sizes:
        model = load_model(name, 7, shape, seed=0).eval()
        images = some_inputs(name, 2, shape)
        with torch.no_grad():
            logits, inputs = model(images), features(model, images)
            assert logits.shape == (2, 7) and logits.std() > 0
            assert inputs.shape == (2, head(model).in_features)
            assert torch.equal(head(model)(inputs), logits)
            assert not torch.equal(inputs[0], inputs[1])
            assert not head(model)._forward_pre_hooks  # features leaves nothing behind


@given(height=st.integers(8, 40), width=st.integers(8, 40), channels=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_odd_sizes_work_too(height, width, channels):
    for name in ("cnn", "cnn_smooth", "shufflenet", "squeezenet"):
        model = load_model(name, 3, (channels, height, width), seed=0).eval()
        with torch.no_grad():
            assert model(torch.rand(1, channels, height, width)).isfinite().all()


def test_small_images_keep_a_4x4_map_before_the_pool():
    """What the adapted stems are for: torchvision's would leave 1 x 1 of 32 pixels."""
    for name, size in [
        ("resnet18", 32),
        ("resnet18", 64),
        ("shufflenet", 32),
        ("shufflenet", 64),
        ("squeezenet", 32),
    ]:
        model = load_model(name, 10, (3, size, size), seed=0).eval()
        maps: list[torch.Size] = []
        last_conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
        last_conv.register_forward_hook(lambda m, i, out, maps=maps: maps.append(out.shape[2:]))
        with torch.no_grad():
            model(torch.rand(1, 3, size, size))
        assert maps == [(4, 4)], (name, size)


def test_mlp_widths():
    model = mlp(10, (1, 4, 4), hidden=(32, 16), activation=nn.Tanh)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(32, 16), (16, 32), (10, 16)]
    assert sum(isinstance(m, nn.Tanh) for m in model) == 2
    assert mlp(10, (1, 4, 4), hidden=())(torch.rand(3, 1, 4, 4)).shape == (3, 10)  # logistic regression


# A pure function of the seed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_the_seed_alone_decides_the_initialization(name):
    shape = (3, 16, 16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = load_model(name, 10, shape, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert states_equal(a, load_model(name, 10, shape, seed=5))
    other = load_model(name, 10, shape, seed=6)
    assert all(not torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True) if p.dim() > 1)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(3)
    a, b = load_model("mlp", 10, (1, 8, 8)), load_model("mlp", 10, (1, 8, 8))
    torch.manual_seed(3)
    assert states_equal(a, load_model("mlp", 10, (1, 8, 8))) and not states_equal(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_a_forward_pass_draws_no_random_numbers(name):
    model = load_model(name, 10, (1, 16, 16), seed=0).train()
    before = torch.get_rng_state()
    model(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


# What influence methods ask of a network ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW_RESNETS)
def test_hessian_vector_products_are_symmetric(name):
    """u.Hv == v.Hu, in double precision, through functional_call and double backward in training mode:
    an in-place operation that spoils a saved tensor raises, or breaks the symmetry."""
    model = load_model(name, 4, (6, 5) if name in SEQUENCES else (2, 8, 8), seed=0).double().train()
    params = {key: value.detach().requires_grad_() for key, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    images = some_inputs(name, 4, (2, 8, 8), generator=generator, dtype=torch.float64)
    loss = nn.functional.cross_entropy(functional_call(model, params, (images,)), torch.arange(4))
    grads = torch.autograd.grad(loss, params.values(), create_graph=True)

    def draw():
        return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params.values()]

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    u, v = draw(), draw()
    hess_v = torch.autograd.grad(dot(grads, v), params.values(), retain_graph=True)
    hess_u = torch.autograd.grad(dot(grads, u), params.values())
    assert abs(dot(u, hess_v)) > 0
    assert torch.isclose(dot(u, hess_v), dot(v, hess_u), rtol=1e-6)


@pytest.mark.parametrize("name", ["cnn_smooth", "mlp_smooth"])
def test_smooth_networks_have_the_curvature_that_their_gradients_show(name):
    """The Hessian predicts the change of the gradient over a small step (with ReLU it need not)."""
    model = load_model(name, 3, (1, 8, 8), seed=0).double()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    step = 1e-5 * torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    shapes = {key: value.shape for key, value in model.named_parameters()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        params = {key: part.view(shapes[key]) for key, part in zip(shapes, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, params, (images,)), torch.arange(6) % 3)

    gradient = torch.func.grad(loss)
    predicted = torch.func.jvp(gradient, (flat,), (step,))[1]
    actual = (gradient(flat + step) - gradient(flat - step)) / 2
    assert torch.allclose(predicted, actual, rtol=0, atol=1e-6 * float(actual.abs().max()))


def test_the_smooth_cnn_starts_with_signals_as_large_as_its_inputs():
    """PyTorch's initialization lets them shrink: the digits reached an accuracy of 0.38 at lr 0.1."""
    inputs = torch.randn(512, 1, 16, 16, generator=torch.manual_seed(0))
    sizes = {}
    for gain in (0.0, 1.3):
        network = smooth_variant(10, (1, 16, 16), gain=gain)
        with torch.no_grad():
            sizes[gain] = features(network, inputs).std().item()
    assert sizes[0.0] < 0.03 and sizes[1.3] > 3 * sizes[0.0], sizes


def test_variants_of_the_smooth_cnn_have_the_parts_that_they_are_asked_for():
    network = smooth_variant(10, (1, 8, 8), nn.GELU, nn.MaxPool2d, groups=8, width=0.5)
    kinds = [type(module) for module in network]
    assert kinds[:4] == [nn.Conv2d, nn.GroupNorm, nn.GELU, nn.MaxPool2d] and network[0].out_channels == 16
    network = smooth_variant(10, (1, 8, 8), stem=16, hidden=False)
    assert [type(module) for module in network[:4]] == [nn.Conv2d, nn.SiLU, nn.Conv2d, nn.SiLU]
    assert (network[0].out_channels, network[2].out_channels, network[-1].in_features) == (16, 32, 64 * 2 * 2)
    assert [tuple(p.shape) for p in load_model("cnn_smooth", 10, (1, 8, 8)).parameters()] == [
        tuple(p.shape) for p in load_model("cnn", 10, (1, 8, 8)).parameters()
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_see_what_a_layer_returned(name):
    """No in-place activation overwrites the output of a convolution or linear layer."""
    model = load_model(name, 4, (6, 5) if name in SEQUENCES else (1, 16, 16), seed=0).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, out: seen.append((out, out.detach().clone())))
    with torch.no_grad():
        model(some_inputs(name, 1, (1, 16, 16)))
    assert seen and all(torch.equal(later, then) for later, then in seen)


def test_channels_last_computes_the_same():
    images = torch.rand(2, 3, 32, 32)
    for name in SMALL:
        model = load_model(name, 10, (3, 32, 32), seed=0).eval()
        with torch.no_grad():
            plain = model(images)
            fast = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        assert torch.allclose(plain, fast, rtol=1e-3, atol=1e-5), name


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(UsageError, match="no nn.Linear"):
        head(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()))


def test_a_step_of_densenet_on_small_grey_pictures():
    model, generator = load_model("densenet121", 2, (1, 32, 32), seed=0).train(), torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 1, 32, 32, generator=generator), torch.arange(4) % 2
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(2):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


# Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("resnet81", 10, (3, 32, 32)), "Did you mean 'resnet18'"),
        (("cnn", 10, (3, 7, 32)), "--image_size 8"),
        (("resnet50", 10, (1, 4, 4)), "--image_size 8"),
        (("cnn", 0, (3, 32, 32)), "at least one output"),
        (("lstm", 10, (3, 32, 32)), "takes sequences"),
        (("cnn", 10, (7, 41)), "try lstm, gru or mlp"),
        (("cnn", 10, (32,)), "channels, height, width"),
        (("cnn", 10, (0, 32, 32)), "channels, height, width"),
        (("cnn",), "num_outputs and input_shape"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(UsageError, match=message):
        load_model(*args)


# Recurrent networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mean", [False, True])
def test_the_fused_kernel_is_the_plain_operators(kind, layers, dtype, tolerance, mean):
    """Outputs and gradients, with other parameters than the module's own, and padded steps."""
    torch.manual_seed(0)
    model = Recurrent(3, 5, kind, hidden=16, layers=layers, mean=mean).to(dtype)
    parameters = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    sequences = torch.randn(6, 9, 6, dtype=dtype)
    sequences[..., -1] = 1
    for b, length in enumerate([9, 9, 5, 1, 7, 3]):
        sequences[b, length:] = 0
    found = {}
    for fused in (True, False):
        model.fused = fused
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        outputs = functional_call(model, leaves, (sequences,))
        found[fused] = [outputs, *torch.autograd.grad(outputs.sin().sum(), leaves.values())]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(("kind", "theirs"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_recurrent_networks_are_pytorchs(kind, theirs):
    """The same parameters in nn.LSTM and nn.GRU, over sequences of other lengths, give the same."""
    torch.manual_seed(0)
    model, reference = Recurrent(3, 5, kind, hidden=16, layers=2), theirs(5, 16, 2, batch_first=True)
    reference.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("head")})
    for length in (1, 4, 9):
        sequence = torch.randn(1, length, 5)
        padded = torch.zeros(1, 9, 6)
        padded[:, :length] = torch.cat([sequence, torch.ones(1, length, 1)], 2)
        torch.testing.assert_close(model(padded), model.head(reference(sequence)[0][:, -1]), rtol=0, atol=1e-6)
