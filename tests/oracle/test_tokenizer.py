"""Tests of the tokenizer against transformers' AutoTokenizer, in the separate Python named by DBRX_ORACLE_PYTHON."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import tiktoken_ext

from dbrx_jax import DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.text.save import merges
from dbrx_jax.text.vocabulary import load_ranks

pytestmark = pytest.mark.slow
CL100K = next(p for d in tiktoken_ext.__path__ if (p := Path(d) / "data" / "cl100k_base.tiktoken").exists())
NAMES = ["demo", "saved demo", "saved cl100k"]
CHAT = [{"role": "user", "content": "Hi,  there"}, {"role": "assistant", "content": "It's 1234567 naïve 日本語 🙂 "}]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{{ tools }}{{ name }}"
)
TRIMMED = "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"


def random_texts():
    """Returns texts of pieces that a pre-tokenizer splits in many ways."""
    draw = random.Random(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "the",
        "Word",
        "é",
        "日本",
        "🙂",
        "1",
        "23",
        "4567",
        "_",
        "?!",
    ]
    pieces += ["\u00a0", "\u2028", "\u0301", "\ud55c", "<|", "|>", "im_end", "½", "٣", "'", "def f(x):", "    "]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(400)]


def calls():
    """Returns calls (method, arguments, options) whose answers must be equal."""
    texts = random_texts()
    for text in ["", " ", *texts]:
        yield "encode", [text], {}
        yield "tokenize", [text], {}
    batch = ["", "a", *texts[:6]]
    for padding in (False, True, "longest", "max_length"):
        for truncation in (None, False, True):
            for side in ("left", "right"):
                for more in ({}, {"max_length": 8}, {"max_length": 8, "pad_to_multiple_of": 4, "return_length": True}):
                    if padding == "max_length" and "max_length" not in more:
                        continue
                    options = {"padding": padding, "truncation": truncation, "padding_side": side, **more}
                    yield "", [batch], options
                    yield "", [texts[0]], options
                    yield "", [texts[0]], options | {"return_tensors": "np", "return_attention_mask": False}
    yield (
        "encode",
        [texts[0]],
        {"return_tensors": "np", "truncation": True, "max_length": 3, "add_special_tokens": False},
    )
    ids = [*range(0, 2500, 7), *range(2540, 2600), 100257, 10**7]
    yield "convert_ids_to_tokens", [[i for i in ids if not 2544 <= i < 2550]], {}
    yield "convert_tokens_to_ids", [["the", "Ġthe", "<|pad|>", "Ã", "no such token", "<|im_end|>"]], {}
    yield "convert_tokens_to_ids", ["Ġthe"], {}
    yield "convert_ids_to_tokens", [5], {}
    rows = [[64, 293, 200, 133, 2541], [2000, 17], []]
    for skip in (False, True):
        yield "decode", [rows[0]], {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        yield "decode", [64], {"skip_special_tokens": skip}
        yield "batch_decode", [rows], {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        yield "batch_decode", [rows[0]], {"skip_special_tokens": skip}
    for name in ("eos_token", "eos_token_id", "pad_token", "pad_token_id", "bos_token", "bos_token_id", "unk_token"):
        yield "get", [name], {}
    for name in ("all_special_tokens", "all_special_ids", "model_max_length", "truncation_side", "special_tokens_map"):
        yield "get", [name], {}
    yield "get", ["vocab_size"], {}
    yield "__len__", [], {}
    yield from chat_calls()


def chat_calls():
    def chat(conversation, **options):
        return "apply_chat_template", [conversation], options

    yield chat(CHAT)
    yield chat([CHAT[0]], add_generation_prompt=True, tokenize=False)
    yield chat([CHAT, [CHAT[0]]], add_generation_prompt=True)
    yield chat([CHAT, [CHAT[0]]], tokenize=False)
    for template in (None, MARKED, TRIMMED):
        for text in ("plain", "with a space ", "in two\nlines\n"):
            messages = [CHAT[0], {"role": "assistant", "content": text}]
            yield chat(messages, continue_final_message=True, tokenize=False, chat_template=template)
            yield chat(messages, continue_final_message=True, chat_template=template)
    yield chat(
        [CHAT, [CHAT[0]]],
        return_dict=True,
        return_tensors="np",
        padding=True,
        tokenizer_kwargs=dict(padding_side="left"),
    )
    yield chat(CHAT, return_dict=True, truncation=True, max_length=9)
    yield chat(CHAT, return_dict=True, chat_template=MARKED, return_assistant_tokens_mask=True)
    yield chat([CHAT, CHAT[:1]], return_dict=True, chat_template=MARKED, return_assistant_tokens_mask=True)
    yield chat(CHAT, tools=[{"name": "f"}], chat_template=MARKED, name="x", tokenize=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    DbrxTokenizer.from_pretrained(source_folder()).save_pretrained(root / "demo")
    (root / "empty").mkdir()
    DbrxTokenizer.from_pretrained(root / "empty", ranks_file=CL100K).save_pretrained(root / "cl100k")
    return dict(zip(NAMES, [source_folder(), root / "demo", root / "cl100k"], strict=True))


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers")
    cases = {"folders": list(map(str, folders.values())), "calls": list(calls()), "ranks": str(CL100K)}
    (out / "cases.json").write_text(json.dumps(cases))
    python = os.environ["DBRX_ORACLE_PYTHON"]  # .ci/run makes it: torch 2.13.0 and transformers 4.57.6
    script = Path(__file__).parent / "tokenizer_answers.py"
    subprocess.run([python, script, out / "cases.json", out / "answers.json"], check=True, timeout=600)
    return json.loads((out / "answers.json").read_text())


def our_answer(tokenizer, method, arguments, options):
    if method == "get":
        return getattr(tokenizer, *arguments)
    result = getattr(tokenizer, method or "__call__")(*arguments, **options)
    return {k: to_list(v) for k, v in result.items()} if isinstance(result, dict) else to_list(result)


def to_list(value):
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(folders, answers, name):
    """Text without special tokens: in text those of transformers become special, and ours do not."""
    tokenizer = DbrxTokenizer.from_pretrained(folders[name])
    for call, want in zip(calls(), answers[str(folders[name])], strict=True):
        assert our_answer(tokenizer, *call) == want, call


def test_merges_are_those_of_transformers(answers, folders):
    ranks = load_ranks(folders["demo"], CL100K, {})
    assert merges(ranks) == [tuple(pair) for pair in answers["merges"]]
