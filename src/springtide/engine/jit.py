"""What all Numba kernels share: where compiled code is kept, which threads run it, and a few float tricks.

Import it before anything is compiled. Knows nothing of models.
"""
# Decorators of Numba say little about types:
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # first: its OpenMP library then serves Numba too, and there is one pool of threads, not two


def _cache_directory() -> str:
    """A writable place that outlives the process; the package's own folder may be read-only. Numba sees changes
    of a kernel's own file, not of this one: hence the digest."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = home / "springtide" / "numba" / digest
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return str(directory)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        pass
    return tempfile.mkdtemp(prefix="springtide-numba-")


if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = _cache_directory()
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")

import numba  # noqa: E402
import numba.extending  # noqa: E402
import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba import prange, types  # noqa: E402

__all__ = [
    "FASTMATH",
    "FUSED",
    "LOG2_E",
    "as_numpy",
    "exp2",
    "from_f32",
    "have_compiled",
    "launch",
    "njit",
    "prange",
    "to_f32",
]

# Never "reassoc": the order of a sum is part of the result.
FUSED = {"contract"}  # multiply-adds in one rounding
FASTMATH = {"contract", "nnan", "nsz"}  # and maxima that vectorise, where a NaN need not survive
LOG2_E = 1.0 / math.log(2.0)  # exp(x) = 2 ** (x * LOG2_E)

_WORTH_WAKING = 1 << 15  # simple operations: some 20 microseconds
intrinsic: Any = numba.extending.intrinsic  # its own type is that of the generator, not of what kernels call
_F32, _I32, _I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def njit(function: Any = None, **options: Any) -> Any:
    """Compile a kernel: kept on disk, free of the interpreter's lock, dividing as NumPy does."""
    compiler = numba.njit(cache=True, nogil=True, error_model="numpy", **options)
    return compiler if function is None else compiler(function)


def have_compiled() -> bool:
    """Whether kernels of an earlier process are kept on disk: then the first call of one takes no time."""
    return any(Path(os.environ["NUMBA_CACHE_DIR"]).glob("**/*.nbc"))


def launch(kernel: Callable[..., Any], work: int, *args: Any) -> Any:
    """Run a parallel kernel; alone on this thread if its `work` (about as many simple operations) is done sooner
    than others wake up. The code is the same, and so are the bits."""
    threads = numba.get_num_threads()
    if threads == 1 or work >= _WORTH_WAKING:
        return kernel(*args)
    numba.set_num_threads(1)
    try:
        return kernel(*args)
    finally:
        numba.set_num_threads(threads)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory; bfloat16, which NumPy lacks, as its bits in uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@intrinsic
def to_f32(_context: Any, value: Any) -> Any:
    """A stored value as float32: itself, or what bfloat16 bits (uint16) stand for."""

    def same(_ctx: Any, _builder: Any, _sig: Any, args: Any) -> Any:
        return args[0]

    def shifted(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(value), same if value == types.float32 else shifted


@intrinsic
def from_f32(_context: Any, value: Any, like: Any) -> Any:
    """A float32 as it is stored beside `like`: itself, or the nearest bfloat16's bits (ties to even; a NaN
    stays a NaN)."""

    def same(_ctx: Any, _builder: Any, _sig: Any, args: Any) -> Any:
        return args[0]

    def rounded(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        nearest = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        magnitude = builder.and_(bits, ir.Constant(_I32, 0x7FFFFFFF))
        is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(_I32, 0x7F800000))
        kept = builder.select(is_nan, ir.Constant(_I32, 0x7FC00000), nearest)
        return builder.trunc(builder.lshr(kept, ir.Constant(_I32, 16)), _I16)

    return like(types.float32, like), same if like == types.float32 else rounded


@intrinsic
def _times_power_of_two(_context: Any, value: Any, exponent: Any) -> Any:
    """value * 2**exponent, for an int32 exponent in [-126, 127]."""

    def generate(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        biased = builder.add(args[1], ir.Constant(_I32, 127))
        return builder.fmul(args[0], builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32))

    return types.float32(types.float32, types.int32), generate


@njit(fastmath=FASTMATH)
def exp2(x: Any) -> Any:
    """2 ** x in float32 for x <= 0, to 1e-7; never below 2 ** -126, the smallest normal number."""
    x = max(x, np.float32(-126.0))
    whole = np.int32(x - np.float32(0.5))  # rounds: x is not positive
    f = x - np.float32(whole)  # [-0.5, 0.5]
    p = np.float32(0.0013264727)
    p = p * f + np.float32(0.0096715127)
    p = p * f + np.float32(0.0555073374)
    p = p * f + np.float32(0.2402224208)
    p = p * f + np.float32(0.6931469776)
    p = p * f + np.float32(1.0)
    return _times_power_of_two(p, whole)
