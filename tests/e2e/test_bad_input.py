"""Everything wrong that a client can send, to a running platform: each is refused or served, and leaves no trace.

After each of them every page is free, nothing runs or waits, the same processes live, and the next request is served.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Platform, mock_flags, wait_until

pytestmark = pytest.mark.e2e

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT = 512
BIG = 20 * 1024 * 1024  # over the 16 MiB that a gateway takes
USER = {"role": "user", "content": "hi"}
GOOD: dict[str, Any] = {"model": "mock", "prompt": "hi", "max_tokens": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A pool so small that pages which are not given back are soon missed."""
    flags = mock_flags(context_length=CONTEXT, num_blocks=64, max_num_seqs=8)
    one = Platform(tmp_path_factory.mktemp("small") / "data", *flags)
    try:
        yield one.ready()
    finally:
        one.stop()


@pytest.fixture(scope="module")
def processes(small: Platform) -> set[int]:
    """The platform's processes before anything bad was sent to it."""
    pids = set(small.pids(""))
    assert len(pids) >= 4, "front, fabric, gateway, agent, replica"
    return pids


@pytest.fixture(autouse=True)
def unharmed(small: Platform, processes: set[int]) -> Iterator[None]:
    yield
    assert_serves(small)
    wait_until(lambda: holds_nothing(small), "nothing runs or waits, and every page is free", 15)
    assert set(small.pids("")) == processes


def assert_serves(platform: Platform) -> None:
    with platform.client() as client:
        answer = client.post(COMPLETIONS, json=GOOD)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"][0]["text"].split()) == 3


def holds_nothing(platform: Platform) -> bool:
    busy = ("replica_running", "replica_waiting", "requests_in_flight", "requests_queued", "body_bytes_held")
    total = platform.metric("springtide_replica_blocks_total")
    free = platform.metric("springtide_replica_blocks_free")
    return free == total == 64 and not any(platform.metric(f"springtide_{name}") for name in busy)


def post(platform: Platform, path: str, body: Any, **options: Any) -> httpx.Response:
    """`body` as JSON, or as it is if it is bytes or a stream of them."""
    sent = {"json": body} if isinstance(body, dict) else {"content": body}
    with platform.client() as client:
        return client.post(path, **sent, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which names the request."""
    error: dict[str, Any] = response.json()["error"]
    assert error["message"] and error["request_id"] == response.headers["x-request-id"]
    return error


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [USER], "max_tokens": 3, **fields}


def raw_chat(content: bytes) -> bytes:
    """A chat body whose one message has this content, byte for byte."""
    return b'{"model":"mock","max_tokens":3,"messages":[{"role":"user","content":"%b"}]}' % content


def of_part(part: dict[str, Any]) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, part]}])


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
FILE = {"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}}
DEEP = b"[" * 100_000 + b"]" * 100_000


REFUSED: dict[str, tuple[str, Any, list[str]]] = {  # what it is: path, body, what the refusal names
    "no body": (CHAT, b"", ["JSON"]),
    "half an object": (CHAT, b'{"model":"mock","mess', ["JSON"]),
    "two objects": (CHAT, b"{}{}", []),
    "not a number": (CHAT, b'{"model":"mock","messages":[{"role":"user","content":"a"}],"top_p":NaN}', ["JSON"]),
    "a list": (CHAT, b"[]", ["object"]),
    "null": (COMPLETIONS, b"null", ["object"]),
    "messages as text": (CHAT, chat(messages="hi"), ["messages"]),
    "a message as text": (CHAT, chat(messages=["hi"]), ["messages"]),
    "a number for content": (CHAT, chat(messages=[{"role": "user", "content": 7}]), ["content"]),
    "a number for a model": (CHAT, chat(model=7), ["model"]),
    "no model": (CHAT, {"messages": [USER]}, ["model"]),
    "text for a number": (CHAT, chat(max_tokens="many"), ["max_tokens"]),
    "text for a flag": (CHAT, chat(stream="yes"), ["stream"]),
    "a number to stop at": (CHAT, chat(stop=5), ["stop"]),
    "an object for a prompt": (COMPLETIONS, {**GOOD, "prompt": {}}, ["prompt"]),
    "an unknown role": (CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), ["wizard", "assistant"]),
    "no messages": (CHAT, chat(messages=[]), ["messages"]),
    "no prompt": (COMPLETIONS, {**GOOD, "prompt": []}, ["prompt"]),
    "an empty prompt": (COMPLETIONS, {**GOOD, "prompt": ""}, ["empty"]),
    "a token that is none": (COMPLETIONS, {**GOOD, "prompt": [2**31 - 1]}, ["2147483647"]),
    "too hot": (CHAT, chat(temperature=2.5), ["temperature", "2.5"]),
    "too cold": (CHAT, chat(temperature=-1), ["temperature"]),
    "hotter than a number": (CHAT, b'{"model":"mock","messages":[],"temperature":1e999}', ["temperature"]),
    "an image": (CHAT, of_part(IMAGE), ["image_url", "messages[0].content[1]"]),
    "a sound": (CHAT, of_part(AUDIO), ["input_audio", "messages[0].content[1]"]),
    "a file": (CHAT, of_part(FILE), ["'file'", "messages[0].content[1]"]),
    "bytes that are no UTF-8": (CHAT, raw_chat(b"\xff\xfe"), ["UTF-8"]),
    "half a character": (CHAT, raw_chat(b"\xe2\x82"), ["UTF-8"]),
    "half a surrogate pair": (CHAT, raw_chat(rb"\ud800"), ["surrogate"]),
    "the other half": (CHAT, raw_chat(rb"a\udc00b"), ["surrogate"]),
    "a surrogate as bytes": (CHAT, raw_chat(b"\xed\xa0\x80"), ["UTF-8"]),
    "endless nesting": (CHAT, b"[" * 200_000, []),
    "deep nesting in a known field": (CHAT, b'{"model":"mock","messages":%b}' % DEEP, []),
    "deep nesting in an unknown one": (CHAT, b'{"model":"mock","messages":[],"x":%b}' % DEEP, ["nested"]),
    "too many choices": (CHAT, chat(n=129), ["n is 129"]),
    "an n beyond any": (CHAT, chat(n=10**30), ["n"]),
    "too many prompts times n": (COMPLETIONS, {**GOOD, "prompt": ["a", "b"], "n": 100}, ["200"]),
    "choices beyond the seats": (COMPLETIONS, {**GOOD, "n": 100}, ["100"]),
    "a bias on no token": (CHAT, chat(logit_bias={str(10**30): 1}), ["logit_bias"]),
    "a bias outside the vocabulary": (CHAT, chat(logit_bias={str(2**31 - 1): 1}), ["logit_bias"]),
    "a huge bias": (CHAT, chat(logit_bias={"5": 10**40}), ["logit_bias"]),
    "a bias beyond any number": (CHAT, chat(logit_bias={"5": 10**400}), []),
    "a seed beyond 64 bits": (CHAT, chat(seed=10**30), ["seed"]),
    "a length beyond any": (CHAT, chat(max_tokens=10**30), ["max_tokens"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_a_400_that_says_what(small: Platform, what: str) -> None:
    path, body, words = REFUSED[what]
    response = post(small, path, body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    said = f"{error['message']} {error['param']}"
    assert [word for word in words if word not in said] == [], error


def test_an_unknown_model_is_a_404_that_names_the_known(small: Platform) -> None:
    response = post(small, CHAT, chat(model="gpt-99"))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert "gpt-99" in error["message"] and "mock" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("length", [1_000, 1_000_000])  # tokenised at once, and in a thread
def test_a_prompt_beyond_the_context_is_a_400_with_both_numbers(small: Platform, stream: bool, length: int) -> None:
    response = post(small, COMPLETIONS, {**GOOD, "prompt": "x" * length, "stream": stream})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert str(length) in error["message"] and str(CONTEXT) in error["message"]
    response = post(small, CHAT, chat(max_tokens=CONTEXT, stream=stream))
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


def test_a_temperature_next_to_nothing_is_served_or_refused(small: Platform) -> None:
    response = post(small, CHAT, chat(temperature=1e-300, top_p=0.5))
    assert response.status_code in (200, 400), response.text


def test_unknown_fields_are_named_and_harm_nothing(small: Platform) -> None:
    message = {**USER, "mood": "good"}
    response = post(small, CHAT, chat(messages=[message], tpyo=1, **{"x\u00e4\r\nset-cookie": "a"}))
    assert response.status_code == 200
    ignored = response.headers["x-springtide-ignored"]
    assert "tpyo" in ignored and "messages[].mood" in ignored
    assert "set-cookie" not in response.headers
    many = post(small, CHAT, chat(**{f"unknown_{i}": i for i in range(5000)}))
    assert many.status_code == 200 and len(many.headers["x-springtide-ignored"]) < 4096


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer sk-wrong", "Basic x", "Bearer \xff", "Bearer " + "x" * 9999]
)
def test_without_a_good_key_nothing_is_done(small: Platform, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key.encode("latin-1")}
    for body in (json.dumps(GOOD).encode(), b"{"):
        response = httpx.post(small.url + COMPLETIONS, content=body, headers=headers, trust_env=False)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")


def pieces(size: int) -> Iterator[bytes]:
    for _ in range(size // 65536):
        yield b" " * 65536


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_20_mb_is_a_413(small: Platform, chunked: bool) -> None:
    response = post(small, CHAT, pieces(BIG) if chunked else b" " * BIG)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def connect(platform: Platform) -> socket.socket:
    return socket.create_connection(("127.0.0.1", platform.port), timeout=30)


@contextmanager
def trickled_header(platform: Platform) -> Iterator[list[int]]:
    """A connection whose request header goes on and on; yields how many lines have gone out."""
    over, sent = threading.Event(), [0]

    def trickle(connection: socket.socket) -> None:
        try:
            while not over.wait(0.02):
                connection.sendall(b"x-more: and more\r\n")
                sent[0] += 1
        except OSError:  # the gateway has had enough of it, as it may
            return

    with connect(platform) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {platform.key}\r\n".encode())
        thread = threading.Thread(target=trickle, args=(connection,))
        thread.start()
        try:
            yield sent
        finally:
            over.set()
            thread.join()


def test_a_header_that_never_ends_stops_nobody(small: Platform) -> None:
    with trickled_header(small) as sent, trickled_header(small):
        wait_until(lambda: sent[0] > 5, "the header goes on", 10)
        before = sent[0]
        for _ in range(10):
            assert_serves(small)
        assert sent[0] > before, "it was served meanwhile, not after"


def test_a_header_without_bounds_is_cut(small: Platform) -> None:
    sent = 0
    with connect(small) as connection, pytest.raises(ConnectionError):
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-large: ".encode())
        while sent < BIG:
            connection.sendall(b"y" * 65536)
            sent += 65536


def test_200_connections_that_send_nothing_stop_nobody(small: Platform) -> None:
    with ExitStack() as silent:
        for _ in range(200):
            silent.enter_context(connect(small))
        for _ in range(10):
            assert_serves(small)
