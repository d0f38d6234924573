"""Compiles a grammar; as a program, tries whether that needs too much time, memory or stack.

A grammar of a few kilobytes can take llguidance seconds or gigabytes, or overflow the stack, which ends the process. So
:mod:`dbrx_jax.engine.constraints` runs this file in a process of its own before it compiles what a user wrote. There it
runs without the rest of the package, so it imports nothing of that.
"""

import json
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_REASON = 300  # characters


def compile_grammar(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """Compiles a grammar and computes its first mask.

    Raises:
      ValueError: the grammar is invalid, matches no text, or exceeds a limit of llguidance; the message is one line.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=300_000,  # also bounds the characters of text that is forced in one piece
        max_lexer_states=50_000,  # about 50 MB, which all copies of a matcher share
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(error_of(matcher))
    return matcher


def error_of(matcher: "LLMatcher") -> str:
    """Returns the error of a matcher in one line."""
    text = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if "NoExtension" in text:
        return "no text matches"
    if "limits." in text:  # advice for the program that calls the library
        return "is too complex"
    # The library quotes an invalid regular expression before and after what is wrong with it.
    return text.split(" 1 | start:")[0].split(" error: ")[-1][:MAX_REASON]


class _Bytes:
    """A vocabulary of single bytes, in the form that llguidance.TokenizerWrapper takes."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _check(grammar: str) -> str:
    """Returns why a grammar cannot be compiled, or nothing if it can."""
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        compile_grammar(LLTokenizer(TokenizerWrapper(_Bytes())), grammar)
    except ValueError as error:
        return str(error)
    return ""


def _main() -> None:
    """Reads a job from standard input, and writes what :func:`_check` returns as JSON.

    The job is {"path": sys.path, "grammar", "seconds": of the processor, "memory" and "stack": bytes}.
    """
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    resource.setrlimit(resource.RLIMIT_STACK, (job["stack"], job["stack"]))
    print(json.dumps(_check(job["grammar"])))


if __name__ == "__main__":
    _main()
