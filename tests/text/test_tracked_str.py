"""Tests of TrackedStr: its methods give the text of str, and a character stays as trusted as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_jax.text.template_sandbox.tracked_str import TrackedStr, concat, flags_of, trusted

# The two alphabets share no character, in any case, so a character tells whether it is trusted.
TRUSTED = "aA|ß \n%"
USERS = "bB<s\t\r{"


def tracked(text):
    return TrackedStr(text, bytes(c in TRUSTED for c in text))


TEXTS = st.text(st.sampled_from(TRUSTED + USERS), max_size=12)
ARGUMENTS = TEXTS.map(tracked) | st.text(st.sampled_from(USERS), min_size=1, max_size=2)
KEEP_FLAGS = {
    "str": lambda s, t, n: str(s),
    "add": lambda s, t, n: s + t,
    "add to str": lambda s, t, n: t + s,
    "multiply": lambda s, t, n: (s * n, n * s),
    "slice": lambda s, t, n: (s[n:], s[:n], s[::-1], s[-3:n:2]),
    "index": lambda s, t, n: s[n] if n < len(s) else "",
    "iterate": lambda s, t, n: list(s),
    "join": lambda s, t, n: s.join([t, s, "b", t]),
    "split": lambda s, t, n: s.split(t, n) if t else [],
    "split at white space": lambda s, t, n: (s.split(), s.split(None, n)),
    "rsplit": lambda s, t, n: s.rsplit(t, n) if t else [],
    "rsplit at white space": lambda s, t, n: (s.rsplit(), s.rsplit(None, n)),
    "splitlines": lambda s, t, n: (s.splitlines(), s.splitlines(True)),
    "partition": lambda s, t, n: s.partition(t) if t else (),
    "rpartition": lambda s, t, n: s.rpartition(t) if t else (),
    "replace": lambda s, t, n: (s.replace("b", t), s.replace(t, "<", n)) if t else (),
    "strip": lambda s, t, n: (s.strip(), s.strip(t), s.lstrip(t), s.rstrip(t)),
    "remove": lambda s, t, n: (s.removeprefix(t), s.removesuffix(t)),
}
MAY_LOSE_FLAGS = {
    "case": lambda s, t, n: [s.upper(), s.lower(), s.title(), s.capitalize(), s.swapcase()],
    "format": lambda s, t, n: s.replace("%", "%s") % ((t,) * s.count("%")),
    "escaped format": lambda s, t, n: (s.replace("%", "") + "%s%%") % t,
    "replace nothing": lambda s, t, n: s.replace("", t),
    "others": lambda s, t, n: [s.center(n + 9, "b"), s.expandtabs(n), s.zfill(n), s.translate({98: "B"}), repr(s)],
}


def leaves(value):
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


@given(TEXTS, ARGUMENTS, st.integers(0, 4))
@pytest.mark.parametrize("name", [*KEEP_FLAGS, *MAY_LOSE_FLAGS])
def test_operation_gives_the_text_of_str_and_no_trust(name, text, argument, n):
    operation = (KEEP_FLAGS | MAY_LOSE_FLAGS)[name]
    got = leaves(operation(tracked(text), argument, n))
    assert [*map(str.__str__, got)] == leaves(operation(text, str.__str__(argument), n))
    for result in got:
        assert flags_of(result) == flags_of(tracked(result)) or (name in MAY_LOSE_FLAGS and type(result) is str)


def test_common_formats_and_cases_keep_flags():
    assert flags_of(trusted("<%s|%s>") % ("user", trusted("own"))) == b"\1\0\0\0\0\1\1\1\1\1"
    assert flags_of(trusted("ab").upper()) == b"\1\1"


def test_constructor_trusts_nothing():
    assert flags_of(TrackedStr(trusted("ab"))) == b"\0\0"
    assert flags_of(concat(["a", trusted("b")])) == b"\0\1"


def test_is_a_str_to_others():
    text = trusted("a")
    assert {text: 1}["a"] == {"a": 1}[text] == 1
    assert (text == "a", hash(text), repr([text])) == (True, hash("a"), "['a']")
