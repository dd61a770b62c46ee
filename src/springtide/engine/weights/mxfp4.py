"""MXFP4, the four-bit floats of the OCP Microscaling Formats (2023), as gpt-oss stores its experts: blocks of 32
values, two in a byte and the lower half first, and a scale for each block, a power of two in one byte.

The layout within a byte is that of https://github.com/openai/gpt-oss.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32  # values that share a scale

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
# The scale that each byte stands for (E8M0), float32 [256]; the last means that there is none.
_POWERS = np.append(np.exp2(np.arange(-127.0, 128.0)), np.nan).astype(np.float32)


def _pairs() -> np.ndarray:
    """The two values in each byte, float32 [256, 2]."""
    nibbles = np.concatenate([_E2M1, -_E2M1])
    every = np.arange(256)
    return np.stack([nibbles[every & 15], nibbles[every >> 4]], axis=1)


_PAIRS = _pairs()


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks uint8 [rows, groups, 16] and scales uint8 [rows, groups] -> float32 [rows, 32 * groups]"""
    values: np.ndarray = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(all="ignore"):  # scales that are not numbers show later, in the logits
        values *= _POWERS[scales][..., None]
    return values.reshape(len(scales), -1)
