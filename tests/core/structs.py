"""Hypothesis strategies for every Struct of core, made from their annotations."""

from __future__ import annotations

import typing
from types import NoneType, UnionType
from typing import Any

import msgspec
from hypothesis import strategies as st

from springtide.core import cluster, engine_api, errors, request

STRUCTS = [
    value
    for module in (cluster, engine_api, errors, request)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
]
_INTEGERS = st.integers(-(2**63), 2**64 - 1)  # what msgpack holds
_FLOATS = st.floats(allow_nan=False)
_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=10),
    bytes: st.binary(max_size=10),
    int: _INTEGERS,
    float: _FLOATS,
    bool: st.booleans(),
    NoneType: st.none(),
    Any: st.recursive(
        st.none() | st.booleans() | _INTEGERS | _FLOATS | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type as it may stand in a Struct."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = {field.name: values(field.type) for field in msgspec.structs.fields(kind)}
        return st.builds(kind, **fields)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    raise TypeError(f"no strategy for {kind}")
