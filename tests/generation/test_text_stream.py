"""Tests of streamed text: incremental decoding and truncation before a stop string."""

import numpy as np
import pytest

from dbrx_jax.generation.stops import StopSearch
from dbrx_jax.generation.stream import BURST, TokenStream
from dbrx_jax.generation.text_stream import completion_text, stream_text
from dbrx_jax.text.tokenizer import DbrxTokenizer

TOKENIZER = DbrxTokenizer({bytes([b]): b for b in range(256)}, {"<|endoftext|>": 258, "<|pad|>": 259})


class FakeStream:
    """A token stream of one row that yields `burst` tokens at a time."""

    def __init__(self, ids, burst, padding=0):
        self.ids, self.burst, self.padding, self.num_yielded = list(ids), burst, padding, 0

    def __iter__(self):
        for start in range(0, len(self.ids), self.burst):
            part = self.ids[start : start + self.burst]
            self.num_yielded += len(part)
            yield np.array([part + [259] * self.padding])

    @property
    def lengths(self):
        return np.array([self.num_yielded])


@pytest.mark.parametrize("burst", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("hello world", (), "hello world"),
        ("hello world", ("wor",), "hello "),
        ("hello world", ("xyz", "o w", "llo"), "he"),
        ("hello wo", ("world",), "hello wo"),
        ("aaab", ("aab",), "a"),
        ("naïve 🙂 stop here", ("🙂 s",), "naïve "),
        ("", ("x",), ""),
    ],
)
def test_stream_text_ends_before_a_stop_string(burst, text, stops, want):
    pieces = list(stream_text(FakeStream(text.encode(), burst, padding=2), TOKENIZER, stops))
    assert "".join(pieces) == want
    assert completion_text(TOKENIZER, text.encode(), stops) == want
    for stop in stops:  # no part of a stop string is emitted
        assert stop not in "".join(pieces)


def test_text_that_starts_no_stop_string_is_not_delayed():
    seen = []
    stream = FakeStream(b"abcdef", 2)
    for piece in stream_text(stream, TOKENIZER, ("fgh",)):
        seen.append(piece)
        if stream.num_yielded == 4:
            assert "".join(seen) == "abcd"


def test_special_tokens_and_padding_give_no_text():
    assert "".join(stream_text(FakeStream([104, 105, 258], 3, padding=4), TOKENIZER)) == "hi"


@pytest.mark.parametrize("burst", [1, 2, 5])
def test_stop_string_is_found_across_bursts(burst):
    search, end = StopSearch(TOKENIZER, ["end now", "zz"]), None
    ids = np.frombuffer(b"this is the end now or later", np.uint8)
    for start in range(0, len(ids), burst):
        end = search.push(ids[start : start + burst])
        if end is not None:
            assert start + end == len("this is the end now")
            break
    assert end is not None


def test_stop_strings_see_the_text_of_special_tokens():
    """As in transformers: generation may end at a special token that is no end of sequence."""
    assert StopSearch(TOKENIZER, ["<|pad|>"]).push(np.array([104, 259])) == 2
    assert StopSearch(TOKENIZER, ["hi"]).push(np.array([104, 258, 105])) is None


def test_generate_stops_within_and_across_bursts(models, expected):
    """A row ends with the second token of a stop string, for every pair of adjacent tokens."""
    e = expected["unnormalised_mqa"]
    greedy = e["greedy"][0]
    tokenizer = DbrxTokenizer({bytes([b]): b for b in range(256)}, {"<|endoftext|>": 258})
    tokenizer._bytes = {i: b"<%d>" % i for i in range(260)}
    assert len(greedy) > BURST
    for i in range(len(greedy) - 1):
        stop = tokenizer.decode(greedy[i : i + 2])
        options = {"max_new_tokens": len(greedy), "eos_token_id": None, "stop_strings": [stop], "tokenizer": tokenizer}
        stream = TokenStream(models("unnormalised_mqa"), e["tokens"][:1], **options)
        assert collect(stream) == list(greedy[: i + 2])


def collect(stream):
    return [int(t) for tokens in stream for t in tokens[0]]
