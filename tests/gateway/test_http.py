"""The small parts beneath an exchange: the byte budget, CORS, deadlines."""

from __future__ import annotations

import pytest

from springtide.core.errors import InvalidRequest, Overloaded
from springtide.gateway.http import ByteBudget, Cors, read_timeout_header


def test_bodies_hold_bytes_of_one_budget() -> None:
    budget = ByteBudget(100)
    budget.take(60)
    with pytest.raises(Overloaded) as refused:
        budget.take(41)
    assert refused.value.retry_after
    budget.give(60)
    budget.take(100)
    assert budget.held == 100


def test_any_page_may_call_a_gateway_that_says_so() -> None:
    headers = dict(Cors("*").headers(b"https://a.example"))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert Cors("*").headers(None) == []


def test_only_listed_pages_may_call_a_gateway_with_a_list() -> None:
    cors = Cors("https://a.example, https://b.example")
    assert dict(cors.headers(b"https://b.example"))[b"access-control-allow-origin"] == b"https://b.example"
    refused = dict(cors.headers(b"https://c.example"))
    assert b"access-control-allow-origin" not in refused
    assert refused[b"vary"] == b"origin"


def test_no_page_may_call_a_gateway_without_origins() -> None:
    assert b"access-control-allow-origin" not in dict(Cors("").headers(b"https://a.example"))


def test_a_deadline_is_seconds_above_zero() -> None:
    assert read_timeout_header(None) is None
    assert read_timeout_header("2.5") == 2.5
    for wrong in ("", "soon", "0", "-1", "nan", "inf"):
        with pytest.raises(InvalidRequest):
            read_timeout_header(wrong)
