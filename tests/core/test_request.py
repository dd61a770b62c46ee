"""Every sampling parameter out of its range is refused by name."""

from __future__ import annotations

import math

import msgspec
import pytest

from springtide.core.errors import InvalidRequest
from springtide.core.request import Request, SamplingParams

GOOD = [
    {},
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"top_p": 1e-9},
    {"top_k": 5},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 10.0},
    {"n": 128},
    {"max_tokens": 5, "min_tokens": 5},
    {"logit_bias": {0: -100.0, 5: 100.0}},
    {"seed": -(2**63)},
    {"stop": ("x",) * 16},
    {"stop": ("x" * 1024,)},
    {"logprobs": 0},
    {"logprobs": 20},
]
BAD = {
    "temperature": [-0.1, 2.1, math.nan, math.inf],
    "top_p": [0.0, 1.1, math.nan],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, 1e-300, 0.0099, 10.1, math.nan],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "top_k": [-1, 2**31],
    "n": [0, 129],
    "max_tokens": [0, 2**31],
    "min_tokens": [-1],
    "logprobs": [-1, 21],
    "seed": [2**63, -(2**63) - 1],
    "stop": [("",), ("x",) * 17, ("x" * 1025,)],
    "logit_bias": [{-1: 0.0}, {1: 100.1}, {1: math.nan}, {2**64: 0.0}],
    "stop_token_ids": [(-1,), (1, 2**31), (2**64,)],
}


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_parameters_in_their_ranges_pass(fields):
    params = SamplingParams(**fields)
    assert params.check() is params


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD.items() for value in bad])
def test_a_parameter_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name) as error:
        SamplingParams(**{name: value}).check()
    assert error.value.param == name
    assert error.value.status == 400


def test_more_tokens_at_least_than_at_most_is_refused_with_both_numbers():
    with pytest.raises(InvalidRequest, match=r"min_tokens \(9\) is above max_tokens \(8\)"):
        SamplingParams(min_tokens=9, max_tokens=8).check()


def test_choices_are_counted_over_all_prompts():
    sampling = SamplingParams(n=3)
    chat = Request(id="r", model="m", tenant="t", sampling=sampling, messages=())
    assert chat.num_choices == 3
    assert msgspec.structs.replace(chat, messages=None, prompts=("a", (1, 2))).num_choices == 6
