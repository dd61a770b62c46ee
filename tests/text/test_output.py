"""Text as it comes, token by token, against the plain way: decode all, then cut at the stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.errors import InvalidRequest
from springtide.text.output import OutputText
from springtide.text.tokenizer import Tokenizer

LETTERS = "asthe op\u00e9\u65e5\n"
STOPS = st.lists(st.text(alphabet=LETTERS + "\ufffd", min_size=1, max_size=5), max_size=4, unique=True).map(tuple)
IDS = st.lists(st.one_of(st.sampled_from(list(b"asthe op\n")), st.integers(0, 266), st.integers(256, 263)), max_size=60)
CUTS = st.lists(st.integers(0, 60), max_size=12)


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids cut in pieces, some empty."""
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(edges)]


def cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; of several at one place, before the longest."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [id for text in texts for id in tokenizer.encode(text)]


@given(ids=IDS, cuts=CUTS, stops=STOPS)
def test_pieces_together_are_the_text_of_all_tokens(tiny, ids, cuts, stops):
    output = OutputText(tiny, stop=stops)
    text = "".join(output.push(piece) for piece in pieces(ids, cuts)) + output.finish()
    assert (text, output.matched) == cut_at_stop(tiny.decode(ids), stops)


@given(text=st.text(alphabet=LETTERS, max_size=30), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(tiny, text, stops):
    output, sent, raw = OutputText(tiny, stop=stops), "", b""
    for id in tiny.encode(text):
        sent += output.push([id])
        if output.matched is not None:
            return
        raw += tiny.token_bytes(id)
        whole_characters = raw.decode(errors="ignore")
        held = whole_characters[len(sent) :]
        assert whole_characters == sent + held
        assert not held or any(stop.startswith(held) for stop in stops)


@given(ids=IDS, cuts=CUTS, stops=STOPS, at=st.integers(0, 60))
def test_a_resumed_text_goes_on_as_if_nothing_had_happened(tiny, ids, cuts, stops, at):
    first = OutputText(tiny, stop=stops)
    prior_ids = ids[:at]
    sent = "".join(first.push([id]) for id in prior_ids)

    resumed = OutputText(tiny, stop=stops, prior_ids=prior_ids, prior_text=sent)
    text = "".join(resumed.push(piece) for piece in pieces(ids[at:], cuts)) + resumed.finish()

    assert (sent + text, resumed.matched) == cut_at_stop(tiny.decode(ids), stops)


@given(ids=IDS, stops=STOPS, at=st.integers(0, 60), lost=st.integers(1, 5))
def test_what_was_made_but_never_sent_is_sent_after_a_resume(tiny, ids, stops, at, lost):
    first = OutputText(tiny, stop=stops)
    sent = "".join(first.push([id]) for id in ids[:at])[:-lost]

    resumed = OutputText(tiny, stop=stops, prior_ids=ids[:at], prior_text=sent)
    text = resumed.push(ids[at:]) + resumed.finish()

    assert sent + text == cut_at_stop(tiny.decode(ids), stops)[0]


def test_what_was_held_back_and_then_sent_at_the_end_is_not_sent_twice(tiny):
    first = OutputText(tiny, stop=("stopping",))
    prior_ids = ids_of(tiny, "we stop")
    sent = first.push(prior_ids) + first.finish()
    assert sent == "we stop"

    resumed = OutputText(tiny, stop=("stopping",), prior_ids=prior_ids, prior_text=sent)
    assert resumed.push(ids_of(tiny, " here")) == " here"
    assert resumed.finish() == ""


def test_text_that_is_not_the_text_of_its_tokens_is_refused(tiny):
    with pytest.raises(InvalidRequest, match="not the text of its tokens"):
        OutputText(tiny, prior_ids=ids_of(tiny, "one thing"), prior_text="another")


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(tiny):
    output = OutputText(tiny, stop=("\nUser:",))
    assert output.push(ids_of(tiny, "fine.")) == "fine."
    assert output.push(ids_of(tiny, "\nUs")) == ""
    assert output.push(ids_of(tiny, "er", ": more", "and more")) == ""
    assert output.matched == "\nUser:"
    assert output.finish() == ""


def test_consumed_counts_up_to_the_token_that_completed_the_stop_string(tiny):
    output = OutputText(tiny, stop=("stop",))
    before, after = ids_of(tiny, "the "), ids_of(tiny, "stop", "and on")
    output.push(before)
    assert output.consumed == len(before)
    output.push(after)
    assert tiny.decode(after[: output.consumed - len(before)]) == "stop"
    output.push(after)
    assert tiny.decode(after[: output.consumed - len(before)]) == "stop"


def test_before_min_tokens_a_stop_string_is_text_like_any_other(tiny):
    ids = tiny.encode("a a a a")
    for least in range(len(ids) + 1):
        output = OutputText(tiny, stop=("a",), min_tokens=least)
        text = "".join(output.push([id]) for id in ids) + output.finish()
        after = tiny.decode(ids[least:])
        assert text == tiny.decode(ids[:least]) + after.split("a")[0]
        assert output.matched == ("a" if "a" in after else None)


def test_a_stop_string_may_begin_before_min_tokens_and_end_after(tiny):
    ids = ids_of(tiny, "o", "p", " ", "s", "x")
    output = OutputText(tiny, stop=("p s", "op"), min_tokens=2)
    assert "".join(output.push([id]) for id in ids) == "o"
    assert output.matched == "p s"

    resumed = OutputText(tiny, stop=("p s", "op"), min_tokens=2, prior_ids=ids[:2], prior_text="o")
    assert resumed.push(ids[2:]) == ""
    assert resumed.matched == "p s"


def test_a_held_back_beginning_is_given_when_it_turns_out_to_be_none(tiny):
    output = OutputText(tiny, stop=("stopping",))
    assert output.push(ids_of(tiny, "a stop")) == "a "
    assert output.push(ids_of(tiny, " sign")) == "stop sign"


def test_a_character_is_given_when_its_last_byte_comes(tiny):
    output = OutputText(tiny)
    assert [output.push([byte]) for byte in "\u65e5\U0001f600".encode()] == ["", "", "\u65e5", "", "", "", "\U0001f600"]


def test_an_unfinished_character_at_the_end_is_one_replacement(tiny):
    output = OutputText(tiny)
    assert output.push([*b"ok", 0xE6, 0x97]) == "ok"
    assert output.finish() == "\ufffd"


def test_tokens_that_end_the_sequence_and_control_tokens_give_no_text(tiny):
    output = OutputText(tiny)
    comma = tiny.encode(",")
    end = tiny.special_tokens["<|im_end|>"]
    assert output.push([*tiny.encode("the"), end, *comma], stop_ids=frozenset(comma)) == "the"
    assert output.consumed == len(tiny.encode("the")) + 2
