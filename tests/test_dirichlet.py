"""Partitions: equal to flwr-datasets where they must be, disjoint, complete, of the right sizes."""

import hashlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.dirichlet import dirichlet_partition
from utils.errors import UsageError
from utils.partition import (
    class_preference_partition,
    iid_partition,
    label_shards_partition,
    natural_partition,
    owners_by_size,
    partition,
    sizes_partition,
)
from utils.registry import PARTITIONS

BALANCED = np.arange(1000) * 7 % 10
SKEWED = np.minimum(np.arange(1000) ** 2 // 97 % 100 // 9 * 7 % 13, 9)  # classes of 81 to 269 samples

labels = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(np.array)
seeds = st.integers(0, 2**32)


def digest(shards):
    joined = np.concatenate([np.sort(shard) for shard in shards]).astype("<i8")
    return hashlib.sha256(joined.tobytes()).hexdigest()[:16]


def assert_valid(shards, n, num_workers, complete=True):
    assert len(shards) == num_workers
    assert all(shard.dtype == np.int64 and shard.ndim == 1 for shard in shards)
    joined = np.concatenate(shards)
    assert len(np.unique(joined)) == len(joined)
    assert np.isin(joined, np.arange(n)).all()
    assert not complete or len(joined) == n


def flwr_partition(labels_n, num_workers, alpha, seed, min_shard, self_balancing):
    pytest.importorskip("flwr_datasets", exc_type=ModuleNotFoundError)  # a broken one must fail
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(num_workers, "label", alpha, min_shard, self_balancing, True, seed)
    partitioner.dataset = Dataset.from_dict({"label": labels_n.tolist(), "id": range(len(labels_n))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at every retry
        return [np.array(partitioner.load_partition(k)["id"]) for k in range(num_workers)]


@pytest.mark.parametrize(
    "labels_n, num_workers, alpha, seed, min_shard, self_balancing",
    [
        (BALANCED, 1, 1, 0, 10, False),
        (BALANCED, 8, 0.8, 0, 10, False),
        (BALANCED, 16, 0.3, 42, 28, False),  # retries
        (BALANCED, 5, 100.0, 7, 10, True),
        (BALANCED, 33, 0.8, 1, 0, True),  # the order of a sum over 33 shares shows
        (SKEWED, 8, 0.8, 3, 10, True),
        (SKEWED, 5, 0.1, 1, 10, False),
        (SKEWED, 16, 0.02, 0, 0, False),  # empty shards
        (BALANCED, 2, 0.005, 4, 0, True),  # a shard of exactly the mean size, and shares of 0 / 0
        (SKEWED, 4, 0.001, 14, 0, True),  # 0 / 0
    ],
)
def test_equals_flwr_datasets(labels_n, num_workers, alpha, seed, min_shard, self_balancing):
    theirs = flwr_partition(labels_n, num_workers, alpha, seed, min_shard, self_balancing)
    ours = dirichlet_partition(labels_n, num_workers, alpha, seed, min_shard, self_balancing)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, other)  # the order after the final shuffle as well


def test_fails_where_flwr_datasets_fails():
    arguments = (BALANCED, 16, 0.05, 0, 10, False)
    with pytest.raises(ValueError, match="max number of attempts"):
        flwr_partition(*arguments)
    with pytest.raises(UsageError, match="11"):
        dirichlet_partition(*arguments)


@pytest.mark.parametrize(  # written by flwr-datasets 0.6.1
    "arguments, sizes, sha256",
    [
        ((BALANCED, 8, 0.8, 0), [136, 141, 119, 170, 87, 109, 120, 118], "0a626bfc41286677"),
        (
            (BALANCED, 16, 0.3, 42, 28),  # after retries
            [29, 94, 90, 32, 76, 96, 50, 73, 32, 43, 44, 61, 63, 73, 85, 59],
            "721f6eb45689dbb7",
        ),
        ((SKEWED, 5, 0.1, 1, 10, True), [35, 207, 125, 425, 208], "2bb89c7454682381"),
        ((BALANCED, 2, 0.005, 4, 0, True), [600, 400], "6dcc430ec7fcff91"),
    ],
)
def test_stored_index_sets(arguments, sizes, sha256):
    shards = dirichlet_partition(*arguments)
    assert [len(shard) for shard in shards] == sizes
    assert digest(shards) == sha256


@settings(max_examples=60, deadline=None)
@given(labels, st.data(), seeds, st.floats(0.01, 100), st.booleans())
def test_dirichlet_is_complete_and_repeatable(labels_n, data, seed, alpha, self_balancing):
    num_workers = data.draw(st.integers(1, len(labels_n)))
    shards = dirichlet_partition(labels_n, num_workers, alpha, seed, 0, self_balancing)
    assert_valid(shards, len(labels_n), num_workers)
    again = dirichlet_partition(labels_n, num_workers, alpha, seed, 0, self_balancing)
    assert all(map(np.array_equal, shards, again))


def test_alpha_is_the_skew():
    """Mean share of the largest class of a worker: near 1/10 for a large alpha, near 1 for a small one."""

    def dominance(alpha):
        shards = dirichlet_partition(BALANCED, 8, alpha, seed=0, min_shard=1)
        return np.mean([np.bincount(BALANCED[shard]).max() / len(shard) for shard in shards])

    assert dominance(1000.0) < 0.13 < 0.2 < dominance(0.8) < dominance(0.1)


def test_min_shard_holds():
    without = dirichlet_partition(BALANCED, 16, 0.3, 42, min_shard=0)
    shards = dirichlet_partition(BALANCED, 16, 0.3, 42, min_shard=28)
    assert min(map(len, without)) < 28 <= min(map(len, shards))


@settings(max_examples=60, deadline=None)
@given(labels, st.data(), seeds)
def test_iid(labels_n, data, seed):
    num_workers = data.draw(st.integers(1, len(labels_n)))
    shards = iid_partition(labels_n, num_workers, seed)
    assert_valid(shards, len(labels_n), num_workers)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert all(map(np.array_equal, shards, iid_partition(labels_n, num_workers, seed)))


def test_iid_depends_on_the_seed_and_mixes_classes():
    first, second = (iid_partition(BALANCED, 4, seed) for seed in (0, 1))
    assert not np.array_equal(first[0], second[0])
    assert all(np.bincount(BALANCED[shard], minlength=10).min() > 10 for shard in first)


@settings(max_examples=60, deadline=None)
@given(labels, st.data(), seeds, st.floats(0.001, 10))
def test_class_preference(labels_n, data, seed, concentration):
    num_workers = data.draw(st.integers(1, len(labels_n)))
    size = data.draw(st.integers(1, len(labels_n) // num_workers))
    shards = class_preference_partition(labels_n, num_workers, seed, size, concentration)
    assert_valid(shards, len(labels_n), num_workers, complete=False)
    assert {len(shard) for shard in shards} == {size}
    again = class_preference_partition(labels_n, num_workers, seed, size, concentration)
    assert all(map(np.array_equal, shards, again))


def test_class_preference_draws_a_mix_a_worker():
    shards = class_preference_partition(BALANCED, 8, seed=0, node_datasize=50)
    counts = np.array([np.bincount(BALANCED[shard], minlength=10) for shard in shards])
    assert (counts.max(axis=1) > 12).all()  # 5 a class would be no preference
    assert len(set(counts.argmax(axis=1))) > 3  # and not the same one
    assert all(len(s) == 125 for s in class_preference_partition(BALANCED, 8, seed=0))


def test_class_preference_takes_from_its_classes_first():
    """One worker, two classes of 10, nearly all of its mix on one of them: 12 samples are that class
    whole and 2 of the other."""
    labels_n = np.repeat([0, 1], 10)
    counts = np.bincount(labels_n[class_preference_partition(labels_n, 1, 0, 12, concentration=1e-3)[0]])
    assert sorted(counts) == [2, 10]


@settings(max_examples=60, deadline=None)
@given(labels, st.data(), seeds)
def test_label_shards(labels_n, data, seed):
    num_workers = data.draw(st.integers(1, len(labels_n)))
    each = data.draw(st.integers(1, len(labels_n) // num_workers))
    shards = label_shards_partition(labels_n, num_workers, seed, each)
    assert_valid(shards, len(labels_n), num_workers)
    assert max(map(len, shards)) - min(map(len, shards)) <= each
    assert all(map(np.array_equal, shards, label_shards_partition(labels_n, num_workers, seed, each)))


def test_label_shards_give_few_classes():
    """As in McMahan et al.: 10 balanced classes, 10 workers, 2 pieces each, so every piece is one class."""
    shards = label_shards_partition(BALANCED, 10, seed=0, shards_per_worker=2)
    assert all(len(np.unique(BALANCED[shard])) <= 2 and len(shard) == 100 for shard in shards)


OWN_OPTIONS = {
    "iid": (iid_partition, ()),
    "dirichlet": (dirichlet_partition, ("alpha", "min_shard", "self_balancing")),
    "preference": (class_preference_partition, ("node_datasize", "concentration")),
    "shards": (label_shards_partition, ("shards_per_worker",)),
    "natural": (natural_partition, ("owner_n",)),
    "sizes": (sizes_partition, ("sizes",)),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_partition_hands_each_its_own_options(kind):
    everything = {"alpha": 0.5, "min_shard": 1, "self_balancing": True, "node_datasize": 30}
    everything |= {"shards_per_worker": 3, "concentration": 1.0, "owner_n": np.arange(1000) % 6}
    everything |= {"sizes": (1, 1, 2, 2, 4, 0.5)}
    shards = partition(kind, SKEWED, 6, 5, **everything)
    function, own = OWN_OPTIONS[kind]
    direct = function(SKEWED, 6, seed=5, **{name: everything[name] for name in own})
    assert all(map(np.array_equal, shards, direct))
    assert_valid(shards, 1000, 6, complete=kind != "preference")
    with pytest.raises(TypeError, match="alhpa"):
        partition(kind, SKEWED, 6, 5, alhpa=1.0)


@given(owners=st.lists(st.integers(0, 12), min_size=1, max_size=60), data=st.data())
def test_natural_gives_each_worker_one_of_the_largest_owners(owners, data):
    owner_n = np.array(owners)
    having = owners_by_size(owner_n)
    num_workers = data.draw(st.integers(1, len(having)))
    shards = natural_partition(owner_n, num_workers, 0, owner_n)
    assert [len(set(owner_n[shard])) for shard in shards] == [1] * num_workers
    chosen = [int(owner_n[shard[0]]) for shard in shards]
    assert chosen == sorted(chosen) and all(len(s) == owners.count(k) for s, k in zip(shards, chosen, strict=True))
    left = [owners.count(k) for k in set(owners) - set(chosen)]
    assert not left or min(map(len, shards)) >= max(left)


@pytest.mark.parametrize(
    "kind, num_workers, options, message",
    [
        ("dirichlet", 8, {"alpha": 0}, "--alpha"),
        ("dirichlet", 8, {"alpha": -1.0}, "--alpha"),
        ("dirichlet", 8, {"alpha": float("nan")}, "--alpha"),
        ("dirichlet", 8, {"alpha": float("inf")}, "--alpha"),
        ("dirichlet", 8, {"alpha": 1.0, "min_shard": -1}, "--min_shard"),
        ("dirichlet", 101, {"alpha": 1.0}, r"need 1010 training samples.*1000"),
        ("dirichlet", 16, {"alpha": 0.05}, r"alpha 0\.05.*16 workers.*--min_shard"),
        ("preference", 8, {"node_datasize": 126}, r"need 1008.*1000.*at most 125"),
        ("preference", 8, {"node_datasize": 0}, "--node_datasize"),
        ("preference", 8, {"concentration": 0.0}, "concentration"),
        ("shards", 8, {"shards_per_worker": 0}, "--shards_per_worker"),
        ("shards", 8, {"shards_per_worker": 126}, "need 1008"),
        ("iid", 0, {}, "--num_workers"),
        ("iid", 1001, {}, "only 1000"),
        ("preference", 1001, {}, "only 1000"),
        ("dirichelt", 8, {}, "dirichlet"),
        ("natural", 8, {}, "who owns each sample"),
        ("natural", 8, {"owner_n": np.arange(1000) % 7}, "7 owners have"),
    ],
)
def test_bad_input_is_one_line(kind, num_workers, options, message):
    with pytest.raises(UsageError, match=message) as error:
        partition(kind, BALANCED, num_workers, 0, **options)
    assert "\n" not in str(error.value)
