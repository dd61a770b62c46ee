"""How much a chat template may do: bytes that it makes and processor time that it takes.

Everything that a template can repeat spends from one budget, so a template that would never end, or that would fill
the memory, ends with `OutOfBudget` in the thread that renders it. Needs no signal and no other process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any

MAX_SECONDS = 1.0
BASE_BYTES = 256 * 2**20
BYTES_PER_INPUT_BYTE = 8
BASE_PROMPT = 2**20
PROMPT_PER_INPUT_BYTE = 4
_STEP_BYTES = 64  # what a step costs that makes nothing
_ITEM_BYTES = 256  # what an item of a container costs at least: looking at it takes time
_MAX_INTEGER_BITS = 4096


class OutOfBudget(Exception):
    """A template did too much; says of what."""


class Budget:
    """What is left for one rendering. `input_bytes` is the size of the messages: who sends much may make much.

    Time is the thread's own processor time: a busy machine does not make a good template fail.
    """

    def __init__(self, input_bytes: int) -> None:
        self._limit = BASE_BYTES + BYTES_PER_INPUT_BYTE * input_bytes
        self._longest_prompt = BASE_PROMPT + PROMPT_PER_INPUT_BYTE * input_bytes
        self._left = self._limit
        self._deadline = time.thread_time() + MAX_SECONDS

    def spend(self, size: int = _STEP_BYTES) -> None:
        """Pay for one step that makes, or is about to make, `size` bytes.

        Raises:
            OutOfBudget: there is not so much left.
        """
        self._left -= size
        if self._left < 0:
            raise OutOfBudget(f"it makes more than {self._limit // 2**20} MiB")
        if time.thread_time() > self._deadline:
            raise OutOfBudget(f"it takes more than {MAX_SECONDS:g} s of processor time")

    def check_prompt(self, prompt: str) -> str:
        """The finished prompt, if it is not many times longer than the messages: tokenising it takes time too.

        Raises:
            OutOfBudget: it is.
        """
        if len(prompt) > self._longest_prompt:
            raise OutOfBudget(f"it makes a prompt of {len(prompt)} characters")
        return prompt

    def made(self, value: Any) -> Any:
        """`value`, paid for. Lazy values are paid for as they are read."""
        if isinstance(value, GeneratorType):
            return self.each(value)
        self.spend(sys.getsizeof(value))
        if isinstance(value, list | tuple | dict):
            self.check_size(value)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, each a step."""
        for value in values:
            self.spend()
            yield value

    def repeated(self, value: Any, times: int) -> None:
        """Pay for a sequence that is about to be repeated."""
        self.spend(self.check_size(value) * max(times, 0))

    def check_size(self, value: Any) -> int:
        """The bytes of a value with all that is in it, each time that it is in it: a list that holds another one
        twice is twice as long as text, and takes twice as long to compare.

        Raises:
            OutOfBudget: it is larger than the whole budget.
        """
        size, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            size += max(sys.getsizeof(item), _ITEM_BYTES)
            if size > self._limit:
                raise OutOfBudget(f"it makes a value of more than {self._limit // 2**20} MiB")
            if isinstance(item, dict):
                waiting.extend(item)
                waiting.extend(item.values())
            elif isinstance(item, list | tuple):
                waiting.extend(item)
        return size


def check_product(left: Any, right: Any) -> None:
    """Refuse to multiply integers into a giant."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def check_power(base: Any, exponent: Any) -> None:
    """Refuse to raise an integer into a giant."""
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * max(exponent, 0))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise OutOfBudget(f"it makes a number of more than {_MAX_INTEGER_BITS} bits")
