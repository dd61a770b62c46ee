"""What the blocks of quantised tensors mean, value by value and in plain Python: a specification for tests, written
from the layouts that https://github.com/ggml-org/ggml publishes (`ggml-common.h`), and from none of its tools.

Each decoder takes the bytes of one block and gives its values, in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Block:
    """`size` bytes; `halves` are the places of the float16 numbers in them."""

    size: int
    halves: tuple[int, ...]
    decode: Callable[[bytes], Iterator[float]]


def _half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _nibbles(packed: bytes) -> list[int]:
    """The lower halves of all bytes, then the upper ones."""
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def _q4_0(block: bytes) -> Iterator[float]:
    for q in _nibbles(block[2:]):
        yield _half(block, 0) * (q - 8)


def _q4_1(block: bytes) -> Iterator[float]:
    for q in _nibbles(block[4:]):
        yield _half(block, 0) * q + _half(block, 2)


def _q5_0(block: bytes) -> Iterator[float]:
    (high,) = struct.unpack_from("<I", block, 2)
    for i, q in enumerate(_nibbles(block[6:])):
        yield _half(block, 0) * ((q | (high >> i & 1) << 4) - 16)


def _q5_1(block: bytes) -> Iterator[float]:
    (high,) = struct.unpack_from("<I", block, 4)
    for i, q in enumerate(_nibbles(block[8:])):
        yield _half(block, 0) * (q | (high >> i & 1) << 4) + _half(block, 2)


def _q8_0(block: bytes) -> Iterator[float]:
    for byte in block[2:]:
        yield _half(block, 0) * _signed(byte)


def _q2_k(block: bytes) -> Iterator[float]:
    scales, quants, d, low = block[:16], block[16:80], _half(block, 80), _half(block, 82)
    for i in range(256):
        scale = scales[i // 16]
        q = quants[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        yield d * (scale & 15) * q - low * (scale >> 4)


def _q3_k(block: bytes) -> Iterator[float]:
    mask, quants, scales, d = block[:32], block[32:96], block[96:108], _half(block, 108)
    for i in range(256):
        group = i // 16
        lower = scales[group % 8] >> 4 * (group // 8) & 15
        upper = scales[8 + group % 4] >> 2 * (group // 4) & 3
        q = quants[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        yield d * ((lower | upper << 4) - 32) * (q - (0 if mask[i % 32] >> i // 32 & 1 else 4))


def _scale_and_low(packed: bytes, group: int) -> tuple[int, int]:
    """Two numbers of 6 bits for each of the 8 groups of a block, in 12 bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    both = packed[group + 4]
    return both & 15 | packed[group - 4] >> 6 << 4, both >> 4 | packed[group] >> 6 << 4


def _q4_k(block: bytes) -> Iterator[float]:
    for i in range(256):
        scale, low = _scale_and_low(block[4:16], i // 32)
        q = block[16 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        yield _half(block, 0) * scale * q - _half(block, 2) * low


def _q5_k(block: bytes) -> Iterator[float]:
    for i in range(256):
        scale, low = _scale_and_low(block[4:16], i // 32)
        q = block[48 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15 | (block[16 + i % 32] >> i // 32 & 1) << 4
        yield _half(block, 0) * scale * q - _half(block, 2) * low


def _q6_k(block: bytes) -> Iterator[float]:
    lower, upper, scales, d = block[:128], block[128:192], block[192:208], _half(block, 208)
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        q = lower[half * 64 + quarter % 2 * 32 + place] >> 4 * (quarter // 2) & 15
        q |= (upper[half * 32 + place] >> 2 * quarter & 3) << 4
        yield d * _signed(scales[i // 16]) * (q - 32)


def _iq4_nl(block: bytes) -> Iterator[float]:
    for q in _nibbles(block[2:]):
        yield _half(block, 0) * _IQ4[q]


def _iq4_xs(block: bytes) -> Iterator[float]:
    (upper,) = struct.unpack_from("<H", block, 2)
    for group in range(8):
        scale = block[4 + group // 2] >> 4 * (group % 2) & 15 | (upper >> 2 * group & 3) << 4
        for q in _nibbles(block[8 + 16 * group :][:16]):
            yield _half(block, 0) * (scale - 32) * _IQ4[q]


def _mxfp4(block: bytes) -> Iterator[float]:
    for q in _nibbles(block[1:]):
        yield 2.0 ** (block[0] - 127) * _E2M1[q]


BLOCKS = {
    "Q4_0": Block(18, (0,), _q4_0),
    "Q4_1": Block(20, (0, 2), _q4_1),
    "Q5_0": Block(22, (0,), _q5_0),
    "Q5_1": Block(24, (0, 2), _q5_1),
    "Q8_0": Block(34, (0,), _q8_0),
    "Q2_K": Block(84, (80, 82), _q2_k),
    "Q3_K": Block(110, (108,), _q3_k),
    "Q4_K": Block(144, (0, 2), _q4_k),
    "Q5_K": Block(176, (0, 2), _q5_k),
    "Q6_K": Block(210, (208,), _q6_k),
    "IQ4_NL": Block(18, (0,), _iq4_nl),
    "IQ4_XS": Block(136, (0,), _iq4_xs),
    "MXFP4": Block(17, (), _mxfp4),
}
