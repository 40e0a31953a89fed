"""A stand-in accelerator: what the project would do on a GPU, on a machine without one.

Inside ``with stand_in() as log:`` the device 'cuda' is there. Its tensors keep their values in the CPU's memory
and compute with the CPU's kernels, so numbers must equal the CPU's; but they behave as a GPU's would: they
refuse to be mixed with CPU tensors, and ``log`` counts what launches a kernel, what makes the host wait and what is
copied, with the project's line. CUDA graphs are tapes that are replayed, see :mod:`tests.stand_in_cuda`.

How: PyTorch's slot for a device of one's own (PrivateUse1) is named 'cuda', a tensor of it wraps a CPU tensor and
sees every operator (``__torch_dispatch__``), and what names a device is translated on the way in. The name cannot be
taken back, so this belongs into a process of its own: :func:`tests.own_process.in_own_process`.

Not modelled: time, memory, and what CUDA's own kernels round differently; autocast is refused.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.stand_in_cuda import Streams, patched_cuda
from tests.stand_in_tools import Log, is_view, leaves, mapped

ROOT = str(Path(__file__).parent.parent)
OWN_FILES = (__file__, *(sys.modules[o.__module__].__file__ for o in (Streams, leaves)))
STAGED = 64 * 1024  # bytes from pageable memory that the driver copies aside at once; for more the host waits

ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_efficientzerotensor"}
ASKS = {"is_same_size", "_has_same_storage_numel"}  # about shapes: no kernel
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# The size of the result, or whether it failed, is only known on the device: the host waits to learn it.
WAITS = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero", "bincount",
    "linalg_eigh", "_linalg_eigh", "linalg_cholesky_ex", "_linalg_solve_ex", "repeat_interleave",
}  # fmt: skip


class DeviceError(RuntimeError):
    """What CUDA would refuse, too."""


LOG = Log()
STREAMS = Streams()
ONE_AT_A_TIME = threading.RLock()  # of the threads that ask for kernels
PINNED: dict[int, Tensor] = {}  # page-locked CPU memory, by address


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """For the test's own looks at device tensors."""
    LOG.silent, before = True, LOG.silent
    try:
        yield
    finally:
        LOG.silent = before


def line() -> str:
    """The innermost line of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and name not in OWN_FILES and ".venv" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def refuse(reason: str) -> None:
    LOG.errors.append(f"{reason} at {line()}")
    raise DeviceError(LOG.errors[-1])


def wait(kind: str, until: int | None = None) -> None:
    """The host waits for the device, or for an event after so many of its copies."""
    if LOG.silent:
        return
    if STREAMS.capture is not None:
        refuse(f"operation not permitted when stream is capturing: {kind}")
    LOG.syncs[kind, line()] += 1
    STREAMS.synchronize(until)


# ---- tensors --------------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor on the device; ``values`` is the CPU tensor behind it (views share its memory)."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        kind = dict(dtype=values.dtype, device=torch.device("privateuseone", 0))
        if values.layout == torch.strided:
            kind |= dict(strides=values.stride(), storage_offset=values.storage_offset())
        tensor = Tensor._make_wrapper_subclass(cls, values.size(), **kind)
        tensor.values = values
        return tensor

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    is_cuda = True

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, DeviceTensor):
            refuse("a device tensor was given a CPU tensor as its data")
        Tensor.data.__set__(self, other)
        self.values = other.values

    def tolist(self) -> list:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def __deepcopy__(self, memo: dict) -> DeviceTensor:
        return self.detach().clone().requires_grad_(self.requires_grad)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with ONE_AT_A_TIME, torch._C.DisableTorchFunction():
            return execute(func, args, kwargs or {})


def values(tree: Any) -> Any:
    """The CPU tensors behind device tensors, in any nesting."""
    return mapped(DeviceTensor, lambda t: t.values, tree)


def is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


# ---- operators ------------------------------------------------------------------------------------


def execute(func, args: tuple, kwargs: dict) -> Any:
    """One operator as the device would run it."""
    name = func.overloadpacket.__name__
    tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    if name in ("_pin_memory", "pin_memory"):
        return pinned(args[0])
    if name == "is_pinned" and not ours:
        return is_pinned(args[0])
    if not ours and not is_device(kwargs.get("device")):
        return func(*args, **kwargs)
    if name == "_to_copy":
        return convert(func, args[0], kwargs)
    if name == "copy_" and not (isinstance(args[0], DeviceTensor) and isinstance(args[1], DeviceTensor)):
        return transfer(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if name == "_local_scalar_dense":
        wait("item")
        return func(read(args[0]))
    if name in INDEXING:
        check_indices(name, args)
    elif ours:
        foreign = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim() > 0]
        if foreign:
            refuse(f"{name}: a device tensor and a CPU tensor {tuple(foreign[0].shape)}")
    if name in WAITS and ours and not (name == "repeat_interleave" and func._overloadname != "Tensor"):
        wait(name)
    return launch(func, name, ours, args, kwargs)


def launch(func, name: str, ours: list[DeviceTensor], args: tuple, kwargs: dict) -> Any:
    """Run a kernel (or make a view) on the CPU tensors and wrap what comes out; what was written to in place
    keeps its wrapper."""
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if name == "_efficientzerotensor":  # a zero without memory, which a wrapper cannot look like
        func = torch.ops.aten.zeros.default
    args, kwargs = values(args), values(kwargs)
    is_kernel = not (name in ALLOCATES or name in ASKS or is_view(func))
    if is_kernel:
        STREAMS.before(func, args, kwargs, refuse)
    result = func(*args, **kwargs)
    if name in ALLOCATES and name != "_efficientzerotensor":  # which is zero, whatever a capture does
        STREAMS.allocated(result)
    if is_kernel:
        STREAMS.after(func, args, kwargs, result)
        if not LOG.silent and STREAMS.capture is None:
            LOG.kernels[name] += 1
    same = {id(t.values): t for t in ours}

    def wrapped(tensor: Tensor) -> Tensor:
        if id(tensor) not in same:
            return DeviceTensor(tensor)
        if tensor.shape != same[id(tensor)].shape:
            raise NotImplementedError(f"{name} changes the shape of a tensor in place")
        return same[id(tensor)]

    return mapped(Tensor, wrapped, result)


def read(tensor: Tensor) -> Tensor:
    """The values of a tensor that the host looks at."""
    if isinstance(tensor, DeviceTensor):
        STREAMS.check_replayed(tensor.values, refuse)
        return tensor.values
    return tensor


def convert(func, source: Tensor, kwargs: dict) -> Tensor:
    """``source.to(...)``: another type, another device, or both."""
    there = is_device(kwargs["device"]) if kwargs.get("device") is not None else isinstance(source, DeviceTensor)
    options = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
    if there and isinstance(source, DeviceTensor):
        return launch(func, "_to_copy", [source], (source,), options)
    on_cpu = func(read(source), **(options | {"device": torch.device("cpu")}))
    return transfer(DeviceTensor(on_cpu) if there else on_cpu, source, kwargs.get("non_blocking", False), written=True)


def transfer(target: Tensor, source: Tensor, non_blocking: bool, written: bool = False) -> Tensor:
    """A copy between host and device. (Of a number it is a kernel with an argument.)"""
    to_device = isinstance(target, DeviceTensor)
    host = source if to_device else target
    where = "to the device" if to_device else "to the host"
    fixed = is_pinned(host)
    asynchronous = non_blocking and (fixed or to_device)
    if source.numel() == 0:
        return target
    if not asynchronous:
        wait(f"copy {where}")
    elif not LOG.silent:
        if STREAMS.capture is not None and not fixed:
            refuse("a copy from pageable memory while a stream is capturing")
        kind = "pinned" if fixed else "pageable" if source.nbytes <= STAGED else "pageable, large"
        LOG.copies[f"{where}, {kind}", line()] += 1
    if not written:
        copy = torch.ops.aten.copy_.default
        pair = (values(target), read(source))
        if not to_device and asynchronous:
            STREAMS.copy_late(*pair)
            return target
        if to_device:
            STREAMS.before(copy, pair, {}, refuse)
        copy(*pair)
        if to_device:
            STREAMS.after(copy, pair, {}, pair[0])
    if to_device and asynchronous and fixed:
        STREAMS.copy_from(source)
    return target


def check_indices(name: str, args: tuple) -> None:
    """Indexing accepts CPU indices (and copies them) and masks (and waits for their count)."""
    target, indices = args[0], [i for i in args[1] if i is not None]
    if not isinstance(target, DeviceTensor):
        refuse(f"{name}: a CPU tensor and indices on the device")
    put = name.startswith("_index_put") or name.startswith("index_put")
    if put and not isinstance(args[2], DeviceTensor) and args[2].dim() > 0:
        refuse(f"{name}: values on the CPU for a device tensor")
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
    if any(not isinstance(i, DeviceTensor) for i in indices):
        wait("index from the host")
    if masks and not (put and len(indices) == 1 and args[2].numel() == 1):  # one value: filled without counting
        wait("index by a mask")


def pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    PINNED[copy.untyped_storage().data_ptr()] = copy
    return copy


def is_pinned(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in PINNED


# ---- making it a device ---------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Operators without a device tensor among their arguments: factories, copies to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with ONE_AT_A_TIME, torch._C.DisableTorchFunction():
            return execute(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """In calls of PyTorch 'cuda' means the stand-in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: self.translated(v) if k == "device" else v for k, v in (kwargs or {}).items()}
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], torch.device("cuda", 0))
        place = slice(1, 2) if func in (Tensor.to, Tensor.new_tensor) else slice(0, 0)
        args = (*args[: place.start], *map(self.translated, args[place]), *args[place.stop :])
        result = func(*args, **kwargs)
        return torch.device("cuda", 0) if isinstance(result, torch.device) and result.type == "cuda" else result

    @staticmethod
    def translated(device: Any) -> Any:
        named = isinstance(device, str) and device.split(":")[0] == "cuda"
        if named or isinstance(device, torch.device) and device.type == "cuda":
            return torch.device("privateuseone", 0)
        return device


class _Threads(ThreadPoolExecutor):
    """Threads that know the device, too: modes are each thread's own."""

    def submit(self, function, /, *args, **kwargs):
        def on_device(*args, **kwargs):
            with _modes():
                return function(*args, **kwargs)

        return super().submit(on_device, *args, **kwargs)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    with torch.autograd.set_multithreading_enabled(False), _Operators(), _Names():
        yield


def _allocate(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _allocate_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _register() -> torch.library.Library:
    """The backend, and what PyTorch's C++ asks of it behind the modes' back (a list as an index, data as a tensor)."""
    torch.utils.rename_privateuse1_backend("CUDA")  # 'cuda' is refused, and read in lower case
    torch._C._acc.register_python_privateuseone_hook(torch.utils.backend_registration._DummyPrivateUse1Hook())
    torch._C._acc.register_python_privateuseone_device_guard(torch.utils.backend_registration._DummyDeviceGuard())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", _allocate)
    library.impl("empty_strided", _allocate_strided)
    library.impl("_copy_from", lambda source, target, non_blocking=False: transfer(target, source, non_blocking))
    for name in ("silu_backward", "mish_backward"):  # kernels of their own on the CPU and on CUDA; elsewhere several
        library.impl(name, getattr(torch.ops.aten, name).default)
    return library


_library: list[torch.library.Library] = []  # registered once a process
_inside: list[bool] = []


@contextlib.contextmanager
def stand_in() -> Iterator[Log]:
    """The device is there, and its log is empty. In a process of its own, please. Inside another one it is that."""
    if _inside:
        LOG.clear()
        yield LOG
        return
    if torch.version.cuda is not None:
        pytest.skip("the stand-in accelerator is for a PyTorch that was built without CUDA")
    if not _library:
        try:
            _library.append(_register())
        except (AttributeError, RuntimeError) as error:  # names of PyTorch's that are not promised
            pytest.skip(f"this PyTorch has no place for a stand-in accelerator: {error}")
    import workers.engine

    LOG.clear()
    STREAMS.clear()
    threads, workers.engine.ThreadPoolExecutor = workers.engine.ThreadPoolExecutor, _Threads
    _inside.append(True)
    try:
        with patched_cuda(LOG, STREAMS, wait, refuse), _modes():
            yield LOG
    finally:
        workers.engine.ThreadPoolExecutor = threads
        _inside.clear()
        PINNED.clear()
