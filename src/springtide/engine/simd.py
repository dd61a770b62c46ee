"""Sixteen float32 lanes as a value in compiled code, so that a kernel can say what stays in registers.

LLVM turns plain loops into vectors only where it can prove that arrays do not overlap; with the eight of an
attention kernel it gives up. The lanes are LLVM's own vector type: one AVX-512 register, two of AVX2, four of NEON.
Usable in Numba functions only.
"""
# Numba's own code says little about types:
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

from springtide.engine.jit import intrinsic

LANES = 16

_F32, _I32, _I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_VECTOR = ir.VectorType(_F32, LANES)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Float32x16")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type: Any) -> None:
        super().__init__(manager, type, _VECTOR)


@intrinsic
def zeros(_context: Any) -> Any:
    """All lanes 0."""

    def generate(_ctx: Any, _builder: Any, _sig: Any, _args: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * LANES)

    return _lanes(), generate


@intrinsic
def load(_context: Any, array: Any, start: Any) -> Any:
    """The sixteen elements from flat index `start` on of a contiguous array: float32, or bfloat16 bits (uint16)."""
    half = array.dtype == types.uint16

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(_I16, LANES) if half else _VECTOR
        loaded = builder.load(_address(ctx, builder, sig, args, vector), align=2 if half else 4)
        if not half:
            return loaded
        wide = ir.VectorType(_I32, LANES)
        bits = builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES))
        return builder.bitcast(bits, _VECTOR)

    return _lanes(array, types.intp), generate


@intrinsic
def store(_context: Any, array: Any, start: Any, lanes: Any) -> Any:
    """Put the lanes at flat index `start` of a contiguous float32 array."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _address(ctx, builder, sig, args, _VECTOR), align=4)
        return ctx.get_dummy_value()

    return types.void(array, types.intp, _lanes), generate


@intrinsic
def add_product(_context: Any, lanes: Any, factor: Any, others: Any) -> Any:
    """lanes + factor * others, in one rounding; `factor` is a float32 for all lanes."""

    def generate(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[1], ir.Constant(_I32, 0))
        everywhere = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        splat = builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), everywhere)
        three = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        fma = cgutils.get_or_insert_function(builder.module, three, f"llvm.fma.v{LANES}f32")
        return builder.call(fma, [splat, args[2], args[0]])

    return _lanes(_lanes, types.float32, _lanes), generate


def _address(ctx: Any, builder: Any, sig: Any, args: Any, vector: ir.VectorType) -> Any:
    data = ctx.make_array(sig.args[0])(ctx, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
