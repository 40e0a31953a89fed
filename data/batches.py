"""Which samples a worker trains on at which step, and the tensors it gets.

A batch is a pure function of (seed, worker, the worker's own step): a permutation of the shard for
each pass, walked through and wrapped, so resuming and replaying need no generator state.

Legend: N workers, B batch, L longest shard, n samples of the data set, C channels, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from data.classification import Classification
from data.task import Task
from data.transforms import augment, augment_sequences, normalization, scale_and_shift
from utils.random import hash64, permutations

PADDING = -1


class Batches:
    """The batch schedule of N workers.

    Worker k, with a shard of n_k samples, takes min(B, n_k) samples a step: positions
    ``step * size .. (step + 1) * size - 1`` of an endless row of permutations of its shard.
    """

    def __init__(self, shards: list[Tensor], batch_size: int, seed: int):
        self.shards, self.batch_size, self.seed = shards, batch_size, seed
        self.lengths_N = torch.tensor([len(s) for s in shards])
        self.sizes_N = self.lengths_N.clamp(max=batch_size)
        self.ragged = bool((self.sizes_N != self.sizes_N[0]).any())
        self._shards_NL = torch.nn.utils.rnn.pad_sequence(list(shards), batch_first=True, padding_value=PADDING)
        self._keys_2N = torch.stack([torch.full((len(shards),), seed), torch.arange(len(shards))])  # seeds, workers
        # The permutations of two passes are kept a worker: a batch may reach into the next pass.
        self._passes_2N = torch.full((2, len(shards)), -1)
        self._orders_2NL = torch.zeros((2, *self._shards_NL.shape), dtype=torch.int64)

    @property
    def width(self) -> int:
        """Samples of the largest batch."""
        return int(self.sizes_N.max())

    @property
    def workers_N(self) -> Tensor:
        """Whose order of batches each follows: its own number."""
        return self._keys_2N[1]

    def ids(self, steps_N: Tensor) -> Tensor:
        """Sample ids [N, B] (int64, padded with -1) of worker k's step ``steps_N[k]``."""
        size_N1, length_N1 = self.sizes_N[:, None], self.lengths_N[:, None]
        slot_B = torch.arange(self.width)
        position_NB = steps_N[:, None] * size_N1 + torch.minimum(slot_B, size_N1 - 1)
        pass_NB, offset_NB = position_NB // length_N1, position_NB % length_N1
        for needed_N in (pass_NB[:, 0], pass_NB[:, -1]):
            self._permute(needed_N)
        worker_N1 = torch.arange(len(self.lengths_N))[:, None]
        order_NB = self._orders_2NL[pass_NB % 2, worker_N1, offset_NB]
        ids_NB = self._shards_NL[worker_N1, order_NB]
        return ids_NB.masked_fill(slot_B >= size_N1, PADDING) if self.ragged else ids_NB

    def _permute(self, needed_N: Tensor) -> None:
        """See to it that the permutation of pass ``needed_N[k]`` is at hand for every worker k."""
        slot_N = needed_N % 2
        workers = (self._passes_2N[slot_N, torch.arange(len(slot_N))] != needed_N).nonzero()[:, 0]
        if len(workers) == 0:
            return
        needed, slot = needed_N[workers], slot_N[workers]
        seed_n1, worker_n1 = self._keys_2N[:, workers, None]
        order = permutations(self.lengths_N[workers], seed_n1, "batch", worker_n1, needed[:, None])
        self._orders_2NL[slot, workers, : order.shape[1]] = order
        self._passes_2N[slot, workers] = needed


class Visits(Batches):
    """The batch schedule of M models that walk over nodes: model m trains on the shard of the node that it is at, in
    the order of its own seed. ``shards``: those of the N nodes; what :class:`Batches` has for each worker it has here
    for each model, as of the last :meth:`move`."""

    def __init__(self, shards: list[Tensor], batch_size: int, seeds_M: list[int]):
        nodes = Batches(shards, batch_size, 0)
        super().__init__([shards[0]] * len(seeds_M), batch_size, 0)
        self.ragged = nodes.ragged
        self._width = nodes.width
        self._of_nodes = nodes.lengths_N, nodes.sizes_N, nodes._shards_NL
        self._keys_2N = torch.stack([torch.tensor(seeds_M), torch.full((len(seeds_M),), -1)])
        self._orders_2NL = torch.zeros((2, len(seeds_M), nodes._shards_NL.shape[1]), dtype=torch.int64)

    @property
    def width(self) -> int:
        """Samples of the largest batch of any node."""
        return self._width

    @property
    def seeds_M(self) -> Tensor:
        """Each model's."""
        return self._keys_2N[0]

    def seed_walk(self, m: int, seed: int) -> None:
        """Model m takes its batches in the order of another seed."""
        self._keys_2N[0, m] = seed
        self._passes_2N[:, m] = -1

    def move(self, node_M: Tensor) -> None:
        """Each model to a node."""
        self.lengths_N, self.sizes_N, self._shards_NL = (values_N[node_M] for values_N in self._of_nodes)
        self._passes_2N[:, self._keys_2N[1] != node_M] = -1
        self._keys_2N[1] = node_M


@dataclass
class Samples:
    """The data set on the device, decoded once; batches are gathered from it.

    ``inputs_n``: pictures, uint8 [n, C, H, W] (for others see :class:`SequenceSamples`); ``targets_n``: as the task
    encodes them. ``augmentation``: 'none', 'crop' or 'crop_flip'.
    """

    augmentations: ClassVar = ("none", "crop", "crop_flip")

    inputs_n: Tensor
    targets_n: Tensor
    mean_C: Tensor
    std_C: Tensor
    augmentation: str = "none"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    task: Task = Classification(())

    def __post_init__(self) -> None:
        self._affine = normalization(self.mean_C, self.std_C, self.dtype)
        self._stored = self.inputs_n
        if self.channels_last:  # gathering whole [H, W, C] blocks gives channels_last batches for free
            self._stored = self.inputs_n.movedim(1, -1).contiguous()
            self.inputs_n = self._stored.movedim(-1, 1)

    def to(self, device: torch.device) -> Samples:
        """The same samples on another device."""
        tensors = ("inputs_n", "targets_n", "mean_C", "std_C")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what networks get: [C, H, W]."""
        return tuple(self.inputs_n.shape[1:])

    def _gather(self, ids: Tensor) -> Tensor:
        images = self._stored[ids]
        return images.movedim(-1, -3) if self.channels_last else images

    def plain(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images [*ids, C, H, W] and labels, as evaluation sees them."""
        return scale_and_shift(self._gather(ids_B), *self._affine, self.dtype), self.targets_n[ids_B]

    def training(self, ids_nB: Tensor, keys_nB: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalized and, where the run augments, augmented images [n, B, C, H, W] and labels [n, B].
        ``keys_nB``: 64-bit hashes that determine each sample's crop and flip."""
        images = self._gather(ids_nB)
        if self.augmentation != "none" and keys_nB is not None:
            flat = augment(images.flatten(0, -4), keys_nB.flatten(), flip=self.augmentation == "crop_flip")
            images = flat.unflatten(0, ids_nB.shape)
        return scale_and_shift(images, *self._affine, self.dtype), self.targets_n[ids_nB]


class SequenceSamples(Samples):
    """Sequences, float32 [n, T, F] with NaN where nothing is known. Networks get [T, F + 1]: standardized features, 0
    where unknown, and a last column that is 1 at steps of which anything is known. ``augmentation``: 'none',
    'noise' or 'mask'."""

    augmentations: ClassVar = ("none", "noise", "mask")

    def __post_init__(self) -> None:
        known_nTF = self.inputs_n.isfinite()
        scaled_nTF = ((self.inputs_n - self.mean_C) / self.std_C).where(known_nTF, 0.0)
        self._stored = torch.cat([scaled_nTF, known_nTF.any(-1, keepdim=True)], -1).to(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what networks get."""
        return tuple(self._stored.shape[1:])

    def plain(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences [*ids, T, F + 1] and targets."""
        return self._stored[ids_B], self.targets_n[ids_B]

    def training(self, ids_nB: Tensor, keys_nB: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, augmented where the run augments."""
        inputs, targets = self.plain(ids_nB)
        if self.augmentation != "none" and keys_nB is not None:
            inputs = augment_sequences(inputs, keys_nB, self.augmentation)
        return inputs, targets


def augmentation_keys(seed: int, workers_n: Tensor, steps_n: Tensor, size: int) -> Tensor:
    """Hashes [n, B] for the augmentation of worker k's step: a function of (seed, worker, step, slot)."""
    slot_B = torch.arange(size, device=workers_n.device)
    return hash64(seed, "augment", workers_n[:, None], steps_n[:, None], slot_B)
