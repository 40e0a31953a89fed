"""Digits, the validation split and subsets, and bad data on purpose."""

import dataclasses
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.classification import Classification
from data.corruption import corrupt
from data.dataset_loader import load_dataset, split_validation, subset
from utils.errors import UsageError

# --------------------------------------------------------------- digits


def test_digits_are_the_same_everywhere():
    data = load_dataset("digits")
    assert data.inputs_n.shape == (1438, 1, 8, 8) and data.test_inputs_m.shape == (359, 1, 8, 8)
    assert data.inputs_n.dtype == torch.uint8 and data.inputs_n.max() == 255
    assert data.targets_n.dtype == torch.int64
    assert (data.task.num_outputs, data.channels, data.inputs_n.shape[2:]) == (10, 1, (8, 8))
    stored = hashlib.sha256(data.inputs_n.numpy().tobytes() + data.test_targets_m.numpy().tobytes())
    assert stored.hexdigest() == "5d7705b6544b271710c6f29f17bd672cb133098e5d1e3c43b0e4928a15a4dc59"


def test_digits_test_split_is_stratified_and_every_digit_is_used_once():
    from sklearn.datasets import load_digits

    data, bunch = load_dataset("digits"), load_digits()
    for label in range(10):
        count = (bunch.target == label).sum()
        assert (data.test_targets_m == label).sum() == round(0.2 * count)
    both = torch.cat([data.inputs_n, data.test_inputs_m]).flatten(1).double() * 16 / 255
    original = bunch.images.reshape(1797, 64)
    assert sorted(map(tuple, both.round().tolist())) == sorted(map(tuple, original.tolist()))


def test_statistics_are_those_of_the_train_images():
    data = load_dataset("digits", image_size=11)
    scaled = data.inputs_n.double() / 255
    assert data.inputs_n.shape[-2:] == data.test_inputs_m.shape[-2:] == (11, 11)
    assert data.mean_C.tolist() == pytest.approx([scaled.mean().item()])
    assert data.std_C.tolist() == pytest.approx([scaled.std(correction=0).item()])


def test_unknown_name_and_bad_image_size():
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        load_dataset("cifar1O")
    with pytest.raises(UsageError, match="--image_size"):
        load_dataset("digits", image_size=0)


# --------------------------------------------------------------- the validation split


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_split_properties(labels, fraction, seed):
    labels_n = torch.tensor(labels)
    if len(set(labels)) == len(labels):  # nothing to validate on
        with pytest.raises(UsageError, match="add training samples"):
            split_validation(labels_n, fraction, seed)
        return
    train, val = split_validation(labels_n, fraction, seed)
    assert sorted(train.tolist() + val.tolist()) == list(range(len(labels)))
    assert train.dtype == val.dtype == torch.int64
    assert (train.diff() > 0).all() and (val.diff() > 0).all()
    for label in set(labels):
        count, taken = labels.count(label), int((labels_n[val] == label).sum())
        assert taken == (0 if count == 1 else min(max(round(fraction * count), 1), count - 1))
    again = split_validation(labels_n, fraction, seed)
    assert torch.equal(again[0], train) and torch.equal(again[1], val)


def test_split_depends_on_the_seed_and_every_sample_can_be_drawn():
    labels_n = torch.arange(40) % 2
    drawn_n = torch.zeros(40)
    for seed in range(80):
        drawn_n[split_validation(labels_n, 0.25, seed)[1]] += 1
    # 80 draws with probability 1/4: mean 20, standard deviation 3.9
    assert drawn_n.min() > 4 and drawn_n.max() < 38
    assert split_validation(labels_n, 0.1, 3)[1].tolist() == [3, 5, 22, 26]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_validation(torch.zeros(4, dtype=torch.int64), fraction, 0)


# --------------------------------------------------------------- a subset


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(1, 80), st.integers(0, 2**40))
def test_subset_has_exactly_so_many_samples_and_otherwise_those_of_the_split(labels, count, seed):
    labels_n = torch.tensor(labels)
    ids = subset(labels_n, count, seed)
    assert ids.dtype == torch.int64 and len(ids) == min(count, len(labels)) and (ids.diff() > 0).all()
    repeated = {label for label in labels if labels.count(label) > 1}  # single samples come last, as in the split
    assert repeated <= set(labels_n[ids].tolist()) or len(ids) < len(repeated)
    if len(ids) < len(labels) and len(set(labels)) < len(labels):
        split = set(split_validation(labels_n, count / len(labels), seed)[1].tolist())
        assert set(ids.tolist()) <= split or set(ids.tolist()) >= split


def test_subset_keeps_shares_and_the_numbers_of_recorded_runs():
    labels_n = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    for count in range(3, 100):
        ids = subset(labels_n, count, 0)
        for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
            assert abs(int((labels_n[ids] == label).sum()) - share * count) <= 1
    assert subset(torch.arange(40) % 2, 4, 3).tolist() == [3, 5, 22, 26]  # as the split of a tenth
    assert len({tuple(subset(torch.arange(40) % 2, 1, seed).tolist()) for seed in range(30)}) > 10


# --------------------------------------------------------------- bad data on purpose


@pytest.fixture
def one_class():
    data = load_dataset("digits")
    zeros = torch.zeros_like(data.targets_n)
    return dataclasses.replace(data, targets_n=zeros, test_targets_m=zeros[:359], task=Classification(["zero"]))


@pytest.mark.parametrize("flip_share, bad_data", [(0.5, None), (0.0, "1:label_flip")])
def test_a_single_class_cannot_be_flipped(one_class, flip_share, bad_data):
    with pytest.raises(UsageError, match="two classes"):
        corrupt(one_class, [torch.arange(5), torch.arange(5, 9)], flip_share, bad_data, 0)


def test_noise_needs_no_second_class(one_class):
    noisy, record = corrupt(one_class, [torch.arange(5), torch.arange(5, 9)], 0.0, "1:noise", 0)
    assert record["kind"] == "noise" and not torch.equal(noisy.inputs_n, one_class.inputs_n)


def test_the_fingerprint_is_that_of_the_data_before_they_are_corrupted():
    data = load_dataset("digits")
    flipped, record = corrupt(data, [torch.arange(50)], 0.5, None, 0)
    assert len(record["flipped"]) == 25 and flipped.fingerprint == data.fingerprint
