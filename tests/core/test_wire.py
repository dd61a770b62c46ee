"""What travels between processes arrives as it was sent."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from springtide.core.request import Delta, Request, SamplingParams
from springtide.core.wire import escape_json, pack, unescape_json, unpack
from tests.core.structs import STRUCTS, values


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_struct_arrives_as_it_was_sent(struct, data):
    value = data.draw(values(struct))
    assert unpack(pack(value), struct) == value


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escaped_text_is_the_inside_of_a_json_string(text):
    assert json.loads(b'"' + escape_json(text) + b'"') == text
    assert unescape_json(escape_json(text)) == text


def test_a_lone_surrogate_becomes_a_question_mark():
    assert unescape_json(escape_json("a\ud83db")) == "a?b"


@given(st.binary(max_size=50))
def test_bytes_that_are_no_request_are_refused(data):
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        unpack(data, Request)


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        unpack(pack({"temperature": "hot"}), SamplingParams)


def test_a_delta_carries_its_text_already_escaped():
    delta = Delta(0, "text", escape_json('say "hi"\n'), [1, 2], 5)
    assert unpack(pack(delta), Delta).text == b'say \\"hi\\"\\n'
