"""Tests of constrained output by random walks: at each step one of the allowed tokens comes next."""

import functools
import json
import re
import subprocess
import sys
import threading
import time

import jsonschema
import numpy as np
import pytest
import regex

from dbrx_jax.engine import constraints as module
from dbrx_jax.engine.constraints import Constraints
from dbrx_jax.errors import GenerationError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": -5, "maximum": 150},
        "kind": {"enum": ["alpha", "Ωmega", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-zé]{1,4}$"}, "maxItems": 3},
        "parents": {"type": "array", "items": {"$ref": "#/$defs/address"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "parents"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "flat": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
TREE = {  # recursive
    "type": "object",
    "properties": {
        "value": {"type": "number", "minimum": -0.5, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
FORMATS = {
    "anyOf": [
        {"type": "string", "format": "date"},
        {"type": "array", "prefixItems": [{"const": "x"}, {"multipleOf": 3, "type": "integer"}], "items": False},
    ]
}
SCHEMAS = {"person": PERSON, "tree": TREE, "formats": FORMATS, "object": {"type": "object", "maxProperties": 3}}
PATTERNS = [
    r"[a-c]{2,4}(-[0-9]+)?",
    r"\p{Greek}+ = -?(0|[1-9][0-9]{0,5})\.",
    r"(?i:yes|no)!*",
    r"/\*[^*]{0,9}\*/\n",
    r"",
]
CHOICES = [
    "yes",
    "yes, of course",
    "naïve",
    "日本語",
    "🙂🙃",
    "<|im_end|>",
    "<|im_start|>",
    'a "b"\\ / [c]\n',
    "x y\tz",
]
CLOSING = rb'^["}\]n]|[}\]]$'


def allowed_tokens(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@functools.cache
def tokens_like(tokenizer, pattern):
    return np.array([i for i in range(len(tokenizer)) if re.search(pattern, tokenizer.token_bytes(i))])


def walk(tokenizer, constraint, seed, prefer=CLOSING, patience=40):
    """Returns the tokens of a random walk without the last, which ends it; after `patience` tokens it prefers some."""
    rng = np.random.default_rng(seed)
    eos = [tokenizer.eos_token_id, tokenizer.special_tokens["<|im_end|>"]]
    matcher, tokens = constraint.matcher(), []
    while len(tokens) < 600:
        allowed = allowed_tokens(matcher.mask())
        may_end = np.isin(eos, allowed)
        assert may_end[0] == may_end[1]
        assert matcher.is_finished == (set(eos) == set(allowed[:3]))
        assert allowed.max() < len(tokenizer)
        preferred = np.intersect1d(allowed, tokens_like(tokenizer, prefer)) if len(tokens) >= patience else allowed
        token = rng.choice(eos if may_end[0] and rng.random() < 0.2 else preferred if preferred.size else allowed)
        matcher.accept(token)
        if token in eos:
            assert matcher.is_finished
            return tokens
        assert token not in tokenizer.special_tokens.values()
        tokens.append(int(token))
    raise AssertionError(f"no end after {tokenizer.decode(tokens)!r}")


def text_of(tokenizer, tokens):
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()  # fails if it is not UTF-8


class TestText:
    @pytest.mark.parametrize("name", SCHEMAS)
    def test_json_matches_its_schema(self, demo_constraints, cl100k, name):
        checker = jsonschema.Draft202012Validator(
            SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        texts = set()
        for tokenizer, constraints in (demo_constraints, cl100k):
            constraint = constraints.json_schema(json.dumps(SCHEMAS[name]))
            for seed in range(5):
                text = text_of(tokenizer, walk(tokenizer, constraint, seed))
                checker.validate(json.loads(text))
                texts.add(text)
        assert len(texts) > 5

    def test_json_object_is_an_object(self, cl100k):
        tokenizer, constraints = cl100k
        for seed in range(4):
            assert isinstance(json.loads(text_of(tokenizer, walk(tokenizer, constraints.json_object(), seed))), dict)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_text_matches_the_regular_expression(self, demo_constraints, cl100k, pattern):
        for tokenizer, constraints in (demo_constraints, cl100k):
            for seed in range(5):
                text = text_of(tokenizer, walk(tokenizer, constraints.regex(pattern), seed))
                assert regex.fullmatch(pattern, text), text

    def test_every_choice_can_come_and_nothing_else(self, demo_constraints, cl100k):
        for tokenizer, constraints in (demo_constraints, cl100k):
            constraint = constraints.choice(CHOICES)
            texts = {text_of(tokenizer, walk(tokenizer, constraint, seed)) for seed in range(80)}
            assert texts == set(CHOICES)

    def test_white_space_ends(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        tokens = walk(tokenizer, constraints.json_schema(PERSON), 0, rb"^\s+$", patience=0)
        text = text_of(tokenizer, tokens)
        assert "\n" in text
        assert len(text) < 2000
        jsonschema.validate(json.loads(text), PERSON)


class TestMask:
    def test_mask_is_that_of_partial_matches(self, demo_constraints):
        """The module regex finds independently whether a text can go on to match."""
        tokenizer, constraints = demo_constraints
        pattern = r"[a-c]{2,4}(-[0-9]+)?"
        matcher = constraints.regex(pattern).matcher()
        text = ""
        for piece in ("", "a", "bc", "-", "12"):
            for token in tokenizer.encode(piece):
                matcher.accept(token)
            text += piece
            later = {i: text + tokenizer.token_bytes(i, True).decode("latin-1") for i in range(2560)}
            want = {
                i for i, longer in later.items() if longer != text and regex.fullmatch(pattern, longer, partial=True)
            }
            if regex.fullmatch(pattern, text):
                want |= {2550, 2553}
            mask = matcher.mask()
            assert (mask.shape, mask.dtype) == ((80,), np.uint32)
            assert set(allowed_tokens(mask).tolist()) == want

    @pytest.mark.parametrize("constraint", [("json_schema", PERSON), ("choice", CHOICES), ("regex", PATTERNS[0])])
    def test_tokens_outside_the_mask_are_refused(self, demo_constraints, constraint):
        tokenizer, constraints = demo_constraints
        constraint = getattr(constraints, constraint[0])(constraint[1])
        tokens, matcher = walk(tokenizer, constraint, 3), constraint.matcher()
        for count, token in enumerate([*tokens, 2553]):
            if count < 8 or count >= len(tokens):
                allowed = set(allowed_tokens(matcher.mask()).tolist())
                for other in {*range(-9, 2560), 2560, 1 << 20} - allowed:
                    with pytest.raises(GenerationError, match=f"token {other} after {count} tokens"):
                        matcher.accept(other)
            matcher.accept(token)

    def test_forced_text_has_the_tokens_of_the_tokenizer(self, cl100k):
        tokenizer, constraints = cl100k
        text = "unbelievable temperatures, forced " * 20  # longer than the pieces that are encoded
        tokens = walk(tokenizer, constraints.choice([text]), 0)
        whole = tokenizer.encode(text)
        assert tokens[: len(whole) - 2] == whole[:-2]  # the last space could be part of other tokens
        assert text_of(tokenizer, tokens) == text

    def test_nothing_but_the_end_comes_after_the_end(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        matcher = constraints.regex("a*").matcher()
        assert not matcher.is_finished
        matcher.accept(2553)
        assert matcher.is_finished
        assert allowed_tokens(matcher.mask()).tolist() == [2550, 2553]
        with pytest.raises(GenerationError, match="does not allow"):
            matcher.accept(tokenizer.encode("a")[0])

    def test_end_and_what_is_behind_it_is_ignored(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        a, b = (tokenizer.encode(c)[0] for c in "ab")
        assert constraints.regex("a[bc]").matcher().follow([a, b, 2553, a])
        assert constraints.regex("a*").matcher().follow([a, 2553, b])
        matcher = constraints.regex("a*").matcher()
        assert not matcher.follow([a, a])
        assert allowed_tokens(matcher.mask())[0] == a
        with pytest.raises(GenerationError, match="does not allow"):
            matcher.follow([b])

    def test_finished_without_the_end(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        matcher = constraints.regex("ab?").matcher()
        matcher.accept(tokenizer.encode("a")[0])
        assert not matcher.is_finished
        matcher.accept(tokenizer.encode("b")[0])
        assert matcher.is_finished
        assert constraints.regex("").matcher().is_finished


class TestSharing:
    def test_copy_goes_on_independently(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        a, b = (tokenizer.encode(c)[0] for c in "ab")
        first = constraints.regex("[ab]a?b").matcher()
        first.accept(a)
        second = first.copy()
        first.accept(a)
        np.testing.assert_array_equal(allowed_tokens(first.mask()), [b])
        second.accept(b)
        assert second.is_finished
        with pytest.raises(GenerationError, match="after 2 tokens"):
            first.accept(a)
        first.accept(b)

    def test_threads_share_a_constraint(self, cl100k):
        tokenizer, constraints = cl100k
        constraint = constraints.json_schema(PERSON)
        want = [walk(tokenizer, constraints.json_schema(PERSON), seed) for seed in range(6)]
        got = [None] * 6

        def run(seed):
            got[seed] = walk(tokenizer, constraint, seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == want

    def test_known_grammar_is_tried_once(self, demo_constraints, monkeypatch):
        schema = {"type": "object", "properties": {"tried once": {"type": "null"}}}
        demo_constraints[1].json_schema(schema)
        monkeypatch.setattr(subprocess, "run", None)
        demo_constraints[1].json_schema(schema)


MULTIPLE = {"type": "integer", "multipleOf": 999983}  # takes six seconds and 400 MB


def references(count, **more):
    """Returns a schema that follows a chain of references."""
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, **more} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "null"}}}


def nested(depth):
    return '{"items":' * depth + "{}" + "}" * depth


BAD_SCHEMAS = {
    "text": ("[1]", "expected a JSON object"),
    "not JSON": ('{"type":', "not a JSON schema .Expecting value"),
    "not a number": ({"minimum": float("nan")}, "not a JSON schema"),
    "no value": ({"const": {1, 2}}, "not a JSON schema"),
    "surrogate": ({"const": "\ud800"}, "hex escape"),
    "type": ({"type": "strin"}, "Invalid type: strin$"),
    "keyword": ({"not": {"type": "string"}}, 'Unimplemented keys: ."not".$'),
    "never": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
    "never ends": ({"$ref": "#"}, "no text matches"),
    "remote": ({"$ref": "https://example.com/schema.json"}, "does not fetch resources$"),
    "file": ({"$ref": "file:///etc/passwd"}, "does not fetch resources$"),
    "missing": ({"$ref": "#/$defs/none"}, "does not exist$"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "huge": ({"enum": list(range(20000))}, "longer than 65536 characters"),
    "deep": (nested(200), "recursion limit"),
    "very deep": (nested(7000), "recursion depth"),
    "chain": (references(250), r"more than 1 second, 128 MiB of memory or 1 MiB of stack .signal \d+.$"),
    "sum of choices": ({"allOf": [{"anyOf": [{"minimum": i + j} for j in range(4)]} for i in range(14)]}, "too large"),
    "multiple": (MULTIPLE, "is too complex: "),
}
BAD_PATTERNS = {
    "syntax": ("(a", "regex: unclosed group$"),
    "look-around": ("(?=a)b", "look-around"),
    "back-reference": (r"(a)\1", "backreferences are not supported"),
    "never": (r"[^\x00-\x{10FFFF}]", "no text matches"),
    "bytes": (r"(?-u:\xff)", "invalid UTF-8"),
    "surrogate": ("\udc00", "half of a surrogate pair"),
    "deep": ("(" * 20000 + "a" + ")" * 20000, "nested parentheses"),
    "long": ("a" * 70000, "longer than 65536"),
    "optional": (r"\pL?" * 9000, "is too complex: to compile it takes more than"),
    "fuel": ("|".join(rf"\pL{{{i}}}x" for i in range(1, 4000)), "regex: is too complex$"),
}


class TestErrors:
    def check(self, compile_it, message):
        begin = time.perf_counter()
        with pytest.raises(GenerationError, match=message) as info:
            compile_it()
        assert time.perf_counter() - begin < 20  # a second of the processor, which others may use too
        assert "\n" not in str(info.value)
        assert len(str(info.value)) < 400

    @pytest.mark.parametrize("name", BAD_SCHEMAS)
    def test_bad_schemas_are_refused_in_one_line(self, demo_constraints, name):
        schema, message = BAD_SCHEMAS[name]
        self.check(lambda: demo_constraints[1].json_schema(schema), message)

    @pytest.mark.parametrize("name", BAD_PATTERNS)
    def test_bad_patterns_are_refused_in_one_line(self, demo_constraints, name):
        pattern, message = BAD_PATTERNS[name]
        self.check(lambda: demo_constraints[1].regex(pattern), message)

    @pytest.mark.parametrize("strings", [[], "yes", ["a", 1], ["\ud800"], ["x" * 70000]])
    def test_bad_choices_are_refused(self, demo_constraints, strings):
        self.check(lambda: demo_constraints[1].choice(strings), "^choice: ")

    @pytest.mark.parametrize(("limit", "signal"), [("SECONDS", 6), ("MEMORY", 24)])
    def test_time_and_memory_are_limited(self, demo_constraints, monkeypatch, limit, signal):
        monkeypatch.setattr(module, limit, 1 << 30)  # so that the other limit is reached
        self.check(lambda: demo_constraints[1].json_schema(MULTIPLE), rf"is too complex: .* .signal {signal}.$")

    def test_what_becomes_too_complex_ends_with_an_error(self, demo_constraints):
        tokenizer, constraints = demo_constraints
        matcher = constraints.regex("[xy]" + "(" * 9 + "a" + "{10})" * 9).matcher()
        matcher.accept(tokenizer.encode("x")[0])

        def go_on():
            for _ in range(9):
                matcher.accept(allowed_tokens(matcher.mask())[0])

        self.check(go_on, r"the constraint failed after \d tokens: .*; simplify it")
        self.check(matcher.mask, "the constraint failed")

    def test_options_in_a_schema_do_not_apply(self, demo_constraints):
        with pytest.raises(GenerationError, match="Unimplemented keys"):
            demo_constraints[1].json_schema({"x-guidance": {"lenient": True}, "not": {"type": "string"}})

    def test_vocabularies_that_do_not_fit_are_refused(self, demo_constraints):
        with pytest.raises(GenerationError, match="the model has 2000 ids, and the tokenizer 2554"):
            Constraints(demo_constraints[0], 2000, (2550,))
        with pytest.raises(GenerationError, match="eos_token_id"):
            Constraints(demo_constraints[0], 2560, (9999,))

    def test_missing_package_is_named(self, demo_constraints, monkeypatch):
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(GenerationError, match=r"needs llguidance .*pip install '\.\[serve\]'.* llguidance"):
            Constraints(demo_constraints[0], 2560, (2550,))

    def test_process_that_fails_says_why(self, demo_constraints, monkeypatch, tmp_path):
        broken = tmp_path / "broken.py"
        broken.write_text("raise RuntimeError('why')")
        monkeypatch.setattr(module.grammar_check, "__file__", str(broken))
        with pytest.raises(GenerationError, match="RuntimeError: why"):
            demo_constraints[1].regex("never tried")
