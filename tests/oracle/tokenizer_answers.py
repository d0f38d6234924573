"""Writes what transformers' tokenizers answer. Needs transformers and does not import dbrx_jax.

    python tokenizer_answers.py CASES ANSWERS

CASES is a JSON file: "folders" of tokenizers; "calls", each a method ("" calls the tokenizer itself, "get" reads an
attribute), its arguments and keyword arguments; and "ranks", a tiktoken file. ANSWERS gets, for each folder, the answer
to each call, and "merges", transformers' merges of the ranks.
"""

import base64
import json
import sys
import types
from pathlib import Path

from transformers import AutoTokenizer, BatchEncoding
from transformers.convert_slow_tokenizer import TikTokenConverter


def answer(tokenizer, method, arguments, options):
    if method == "get":
        return getattr(tokenizer, *arguments)
    result = getattr(tokenizer, method or "__call__")(*arguments, **options)
    if isinstance(result, BatchEncoding):  # DBRX has no token_type_ids
        return {name: to_list(value) for name, value in result.items() if name != "token_type_ids"}
    return to_list(result)


def to_list(value):
    return value.tolist() if hasattr(value, "tolist") else value


def merges(path):
    """Returns the merges of transformers' converter, whose reader of ranks files is a package of its own."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
    sys.modules["tiktoken.load"] = load = types.ModuleType("tiktoken.load")
    load.load_tiktoken_bpe = lambda _: ranks
    return TikTokenConverter().extract_vocab_merges_from_model(path)[1]


def main(cases, answers):
    cases = json.loads(Path(cases).read_text())
    result = {"merges": merges(cases["ranks"])}
    for folder in cases["folders"]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result[folder] = [answer(tokenizer, *call) for call in cases["calls"]]
    Path(answers).write_text(json.dumps(result))


main(*sys.argv[1:])
