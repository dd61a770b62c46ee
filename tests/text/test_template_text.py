"""TemplateText does with its characters what str does, and each character keeps where it came from."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from springtide.text.template_text import TemplateText, format_braces, format_percent, join_texts

PARTS = st.lists(st.tuples(st.text(alphabet=" \n.abé", max_size=5), st.booleans()), max_size=6)
SEPARATORS = st.text(alphabet=" \n.ab", min_size=1, max_size=2)


def build(parts: list[tuple[str, bool]]) -> str:
    return join_texts(TemplateText.whole(text) if own else text for text, own in parts)


def origins(text: str) -> list[bool]:
    """For each character whether the template wrote it."""
    own = [False] * len(text)
    for start, end in text.spans if isinstance(text, TemplateText) else ():
        own[start:end] = [True] * (end - start)
    return own


def check(part: str, plain: str, whole: str, start: int) -> None:
    """`part` is the text `plain`, and comes from `start` in `whole`."""
    assert part == plain
    assert origins(part) == origins(whole)[start : start + len(plain)]


@given(PARTS)
def test_joined_text_keeps_the_origin_of_every_character(parts):
    assert origins(build(parts)) == [own for text, own in parts for _ in text]


@given(PARTS, PARTS)
def test_added_text_does_too(left, right):
    assert origins(build(left) + build(right)) == origins(build(left)) + origins(build(right))
    assert build(left) + build(right) == "".join(text for text, _ in left + right)


@given(PARTS, st.integers(-20, 20), st.integers(-20, 20))
def test_slices(parts, start, stop):
    text = build(parts)
    plain = str.__getitem__(text, slice(start, stop))
    check(text[start:stop], plain, text, slice(start, stop).indices(len(text))[0])
    for at in range(len(text)):
        check(text[at], str.__getitem__(text, at), text, at)


@given(PARTS, st.sampled_from([None, " ", "a.", "b"]))
def test_stripping(parts, chars):
    text = build(parts)
    plain = "".join(part for part, _ in parts)
    start = len(plain) - len(plain.lstrip(chars))
    check(text.strip(chars), plain.strip(chars), text, start)
    check(text.lstrip(chars), plain.lstrip(chars), text, start)
    check(text.rstrip(chars), plain.rstrip(chars), text, 0)


@given(PARTS, st.text(alphabet="ab. ", max_size=3))
def test_prefix_and_suffix(parts, affix):
    text = build(parts)
    plain = "".join(part for part, _ in parts)
    check(text.removeprefix(affix), plain.removeprefix(affix), text, len(plain) - len(plain.removeprefix(affix)))
    check(text.removesuffix(affix), plain.removesuffix(affix), text, 0)


@given(PARTS, SEPARATORS, st.integers(-1, 3))
@example([("a", False), ("a", True)], "a", 1)
def test_split_and_joined_again_it_is_the_same(parts, separator, count):
    text = build(parts)
    plain = "".join(part for part, _ in parts)
    for pieces, expected in (
        (text.split(separator, count), plain.split(separator, count)),
        (text.rsplit(separator, count), plain.rsplit(separator, count)),
    ):
        assert pieces == expected
        at = 0
        for piece in pieces:
            check(piece, piece, text, at)
            at += len(piece) + len(separator)


@given(PARTS)
def test_split_at_white_space_and_in_lines(parts):
    text = build(parts)
    plain = "".join(part for part, _ in parts)
    assert text.split() == plain.split()
    assert [o for piece in text.split() for o in origins(piece)] == [
        own for own, character in zip(origins(text), plain, strict=True) if not character.isspace()
    ]
    assert text.splitlines() == plain.splitlines()
    assert [o for line in text.splitlines() for o in origins(line)] == [
        own for own, character in zip(origins(text), plain, strict=True) if character != "\n"
    ]


@given(PARTS, SEPARATORS, PARTS)
def test_replaced_text_is_of_its_own_origin(parts, old, new):
    text, replacement = TemplateText.whole("x") + build(parts), build(new)
    pieces = str.__str__(text).split(old)
    assert text.replace(old, replacement) == replacement.join(pieces)
    assert origins(text.replace(old, replacement)).count(True) == sum(origins(text.replace(old, ""))) + sum(
        origins(replacement)
    ) * (len(pieces) - 1)


def test_str_keeps_the_origins():
    text = TemplateText.whole("a") + "b"
    assert origins(str(text)) == [True, False]


def test_what_is_not_written_here_forgets():
    assert origins(TemplateText.whole("abc").upper()) == [False] * 3
    assert origins(TemplateText.whole("abc")[::-1]) == [False] * 3


def test_formatting_keeps_the_origins():
    assert origins(format_percent(TemplateText.whole("a%sb%%"), "x")) == [True, False, True, False]
    assert format_percent("%s is %d", ("a", 3)) == "a is 3"
    braces = format_braces(TemplateText.whole("a{}b{k}"), ["x"], {"k": TemplateText.whole("y")})
    assert (braces, origins(braces)) == ("axby", [True, False, True, True])
    assert format_braces("{{{0}}}{0}", ["x"], {}) == "{x}x"
