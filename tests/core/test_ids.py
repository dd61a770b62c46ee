"""Ids do not repeat and sort by time; keys are long."""

from __future__ import annotations

import re
import time

from springtide.core.ids import new_api_key, new_id


def test_ids_are_short_words_that_do_not_repeat():
    ids = [new_id("req") for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"req-[0-9a-hjkmnp-tv-z]{20}", id) for id in ids)


def test_later_ids_sort_after_earlier_ones():
    earlier = new_id("x")
    time.sleep(0.002)
    assert earlier < new_id("x")


def test_keys_begin_like_keys_and_do_not_repeat():
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-[0-9a-z]{32}", key) for key in keys)
