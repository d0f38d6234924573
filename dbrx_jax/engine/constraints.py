"""Constrained output: text that matches a JSON schema, a regular expression, or one of several strings.

The library llguidance (extra [serve]) says at each step which tokens may come next. Where only one text may come, it
allows the first token of that text as the tokenizer would encode it.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dbrx_jax.engine import grammar_check
from dbrx_jax.engine.grammar_check import compile_grammar, error_of
from dbrx_jax.errors import GenerationError, install_advice
from dbrx_jax.text.tokenizer import DbrxTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_SIZE = 1 << 16  # characters of a schema, a pattern, or all choices
# Limits of the process that tries to compile a grammar: of its processor, address space and stack.
SECONDS, MEMORY, STACK = 1, 128 << 20, 1 << 20
START_SECONDS = 60
# White space in JSON, between any two tokens of it: a model that repeats it would never end.
WHITE_SPACE = r" |\r?\n[ \t]{0,40}"
MAX_ENCODED = 256  # characters; see _Vocabulary


class Constraints:
    """Compiles constraints for one tokenizer and model; thread-safe.

    Args:
      tokenizer: gives the bytes of every token. Special tokens never match text.
      vocab_size: the model's number of token ids. Those without text are never allowed.
      eos_token_ids: tokens that end a text; all are allowed where it may end, and nowhere else.

    Raises:
      GenerationError: llguidance is not installed, the vocabulary is smaller than the tokenizer's, or there is no
        end-of-sequence token.
    """

    def __init__(self, tokenizer: DbrxTokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise GenerationError(f"constrained output needs llguidance ({error}); {install_advice('serve')}") from None
        if vocab_size < len(tokenizer):
            raise GenerationError(f"vocab_size: the model has {vocab_size} ids, and the tokenizer {len(tokenizer)}")
        eos = sorted({int(i) for i in eos_token_ids if 0 <= i < vocab_size})
        if not eos:
            raise GenerationError("eos_token_id: constrained output ends with an end-of-sequence token; name one")
        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos))
        self._tokenizer = LLTokenizer(vocabulary, eos_token=eos)
        self._no_end = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)  # a mask of all but these
        for i in eos:
            self._no_end[i // 32] &= ~np.uint32(1 << i % 32)

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Constraint":
        """Returns the constraint that the text is JSON that matches a schema; properties come in the schema's order.

        Args:
          schema: a JSON schema of draft 2020-12 or older, or its text. Its `$ref` stay inside it.

        Raises:
          GenerationError: the schema is no JSON object, is too large, matches nothing, or has a keyword that is not
            supported.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(value, Mapping):
                raise ValueError(f"expected a JSON object, got {value!r:.40}")
            options = {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}  # replaces what a stranger sets
            grammar = json.dumps({"grammars": [{"json_schema": {**value, **options}}]}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GenerationError(f"json_schema: not a JSON schema ({error!s:.200})") from None
        return self._compile("json_schema", grammar)

    def json_object(self) -> "Constraint":
        """Returns the constraint that the text is a JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Constraint":
        """Returns the constraint that the whole text matches a regular expression.

        Args:
          pattern: in the syntax of Rust's crate regex, without look-around and back-references.

        Raises:
          GenerationError: the pattern is not valid, is too large, or matches nothing.
        """
        return self._from_pattern("regex", pattern)

    def choice(self, strings: Sequence[str]) -> "Constraint":
        """Returns the constraint that the text is one of several strings.

        Raises:
          GenerationError: there is no string, or they are too long together.
        """
        if isinstance(strings, str) or not strings or not all(isinstance(s, str) for s in strings):
            raise GenerationError(f"choice: expected a list of strings, got {strings!r:.60}")
        return self._from_pattern("choice", "|".join(map(_escape, strings)))

    def _from_pattern(self, name: str, pattern: str) -> "Constraint":
        from llguidance import LLMatcher

        try:
            return self._compile(name, LLMatcher.grammar_from_regex(pattern))
        except UnicodeEncodeError:
            raise GenerationError(f"{name}: holds half of a surrogate pair, which is no text") from None

    def _compile(self, name: str, grammar: str) -> "Constraint":
        if len(grammar) > MAX_SIZE:
            raise GenerationError(f"{name}: is longer than {MAX_SIZE} characters")
        try:
            _try_to_compile(grammar)
            return Constraint(compile_grammar(self._tokenizer, grammar), self._no_end)
        except ValueError as error:
            raise GenerationError(f"{name}: {error}") from None


class Constraint:
    """What a completion may be; immutable and thread-safe, and shared by the completions of one request.

    Matchers share what they learn about the grammar. If one fails because it is too complex, so may the others.
    """

    def __init__(self, compiled: "LLMatcher", no_end: np.ndarray):
        self._compiled, self._no_end = compiled, no_end

    def matcher(self) -> "Matcher":
        """Returns a matcher at the beginning of a completion."""
        return Matcher(self._compiled.deep_copy(), self._no_end)


class Matcher:
    """Follows one completion token by token; used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", no_end: np.ndarray, num_tokens: int = 0):
        self._matcher, self._no_end, self._num_tokens = matcher, no_end, num_tokens
        self._mask: np.ndarray | None = None

    def mask(self) -> np.ndarray:
        """Returns the tokens that may come next, those that end the text included: uint32 (ceil(vocab_size / 32),).

        Bit i % 32 of word i // 32 is that of token i.

        Raises:
          GenerationError: following the constraint became too complex.
        """
        if self._mask is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
            self._check()
            self._mask = mask[: len(self._no_end)]  # llguidance has a bit more than there are ids
        return self._mask

    def accept(self, token: int) -> None:
        """Appends a token to the text.

        Raises:
          GenerationError: the token is not in the mask, or following the constraint became too complex.
        """
        mask, token = self.mask(), int(token)
        if not (0 <= token < 32 * len(mask) and mask[token // 32] >> (token % 32) & 1):
            raise GenerationError(f"the constraint does not allow token {token} after {self._num_tokens} tokens")
        self._mask = None
        self._matcher.consume_token(token)
        self._check()
        self._num_tokens += 1

    def follow(self, tokens: Sequence[int]) -> bool:
        """Appends new tokens, and computes the mask of the next; returns whether nothing but the end may come.

        An end-of-sequence token, and what is behind it, is ignored.

        Raises:
          GenerationError: as :meth:`accept`.
        """
        for token in tokens:
            if self.is_finished:
                return True
            self.accept(token)
        return self.is_finished

    @property
    def is_finished(self) -> bool:
        """True if nothing but the end may come; raises as :meth:`mask` does."""
        return not (self.mask() & self._no_end).any()

    def copy(self) -> "Matcher":
        """Returns a matcher of the same text, which goes on independently."""
        return Matcher(self._matcher.deep_copy(), self._no_end, self._num_tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = error_of(self._matcher)
            raise GenerationError(f"the constraint failed after {self._num_tokens} tokens: {reason}; simplify it")


class _Vocabulary:
    """The tokens of a model, in the form that llguidance.TokenizerWrapper takes."""

    def __init__(self, tokenizer: DbrxTokenizer, vocab_size: int, eos: Sequence[int]):
        self.eos_token_id, self.bos_token_id = eos[0], None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *eos})
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Encodes text that is forced; only the first token is used.

        Long texts are encoded in pieces: byte-pair encoding a word takes time that is quadratic in its length.
        """
        pieces = (text[i : i + MAX_ENCODED] for i in range(0, len(text), MAX_ENCODED))
        return [token for piece in pieces for token in self._tokenizer.encode(piece)]


def _escape(text: str) -> str:
    """Returns a regular expression that matches a text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


@functools.lru_cache(maxsize=256)
def _try_to_compile(grammar: str) -> None:
    """Compiles a grammar in a process with limited time and memory; raises ValueError if it cannot be compiled."""
    job = {"path": sys.path, "grammar": grammar, "seconds": SECONDS, "memory": MEMORY, "stack": STACK}
    command = [sys.executable, "-I", "-S", grammar_check.__file__]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=START_SECONDS)
    if not done.stdout:
        limits = f"{SECONDS} second, {MEMORY >> 20} MiB of memory or {STACK >> 20} MiB of stack"
        how = f"signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
        raise ValueError(f"is too complex: to compile it takes more than {limits} ({how})")
    if reason := json.loads(done.stdout):
        raise ValueError(reason)
