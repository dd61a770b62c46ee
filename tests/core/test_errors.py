"""Errors say what happened and what to do, and travel without losing a word."""

from __future__ import annotations

import pytest

from springtide.core import errors
from springtide.core.errors import InvalidRequest, RequestError, SetupError, SpringtideError, WireError
from springtide.core.wire import pack, unpack

REQUEST_ERRORS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RequestError)
]


def test_the_hint_follows_what_happened():
    assert str(SetupError("port 8000 is in use", hint="choose another")) == "port 8000 is in use (choose another)"
    assert str(SetupError("it is broken")) == "it is broken"


@pytest.mark.parametrize("kind", REQUEST_ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_of_a_replica_is_the_same_at_the_gateway(kind):
    raised = kind("no", hint="try", param="prompt", retry_after=1.5)
    received = RequestError.from_wire(unpack(pack(raised.to_wire()), WireError))
    for name in ("status", "type", "code", "param", "retry_after"):
        assert getattr(received, name) == getattr(raised, name)
    assert str(received) == "no (try)"


@pytest.mark.parametrize("kind", REQUEST_ERRORS, ids=lambda kind: kind.__name__)
def test_every_request_error_has_an_http_status_of_an_error(kind):
    assert 400 <= kind.status < 600
    assert issubclass(kind, SpringtideError)


def test_a_code_of_its_own_wins_over_that_of_its_kind():
    assert InvalidRequest("no").code is None
    assert InvalidRequest("no", code="special").to_wire().code == "special"
