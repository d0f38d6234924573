"""Tests of /v1/completions: its answers' values."""

import json

import pytest

from dbrx_jax.engine.request import Request
from dbrx_jax.generation_config import GenerationConfig
from tests.serving.helpers import complete, refused, stream

PROMPT = "A list is"


def directly(engine, prompt, num_tokens, **options):
    """The completion of the engine itself: its text, tokens and log-probabilities."""
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=True, eos_token_id=(2550, 2553))
    chunks = list(engine.submit(Request(prompt, config, **options)))
    return (
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.tokens],
        [entry for chunk in chunks for entry in chunk.logprobs],
    )


def test_text_and_usage(client, engine, tokenizer):
    ids = tokenizer.encode(PROMPT)
    text, tokens, _ = directly(engine, ids, 5, seed=3)
    answer = complete(client, model="dbrx-demo", prompt=PROMPT, max_tokens=5, seed=3)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "dbrx-demo"
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 5,
        "total_tokens": len(ids) + 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert len(tokens) == 5


def test_sixteen_tokens_by_default(client):
    assert complete(client, prompt=PROMPT)["usage"]["completion_tokens"] == 16


def test_all_forms_of_prompts(client, tokenizer):
    ids = tokenizer.encode(PROMPT)
    other = tokenizer.encode("The")
    text = complete(client, prompt=PROMPT, max_tokens=3, seed=1)["choices"][0]["text"]
    assert complete(client, prompt=ids, max_tokens=3, seed=1)["choices"][0]["text"] == text
    both = complete(client, prompt=["The", PROMPT], max_tokens=3, seed=1, n=2)
    assert complete(client, prompt=[other, ids], max_tokens=3, seed=1, n=2)["choices"] == both["choices"]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["choices"][2]["text"] == text
    assert len({choice["text"] for choice in both["choices"]}) == 4
    assert both["usage"]["prompt_tokens"] == len(ids) + len(other)
    assert both["usage"]["completion_tokens"] == 12


def test_special_tokens_in_a_text_are_text(client, engine, tokenizer):
    complete(client, prompt="a<|im_end|>", max_tokens=1)
    assert engine.requests[-1].prompt == tokenizer.encode("a<|im_end|>")
    assert 2553 not in engine.requests[-1].prompt


def test_logprobs(client, engine, tokenizer):
    ids = tokenizer.encode(PROMPT)
    text, tokens, entries = directly(engine, ids, 4, seed=5, top_logprobs=2)
    choice = complete(client, prompt=PROMPT, max_tokens=4, seed=5, logprobs=2)["choices"][0]
    assert choice["text"] == text
    logprobs = choice["logprobs"]
    texts = [tokenizer.decode([token]) for token in tokens]
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [entry.logprob for entry in entries]
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [
        [logprob for _, logprob in entry.top] for entry in entries
    ]
    assert logprobs["text_offset"] == [len("".join(texts[:i])) for i in range(4)]


def test_the_token_is_in_its_own_top_logprobs(client, engine):
    engine.script = [44, 45]
    logprobs = complete(client, prompt=PROMPT, max_tokens=2, logprobs=1)["choices"][0]["logprobs"]
    for token, logprob, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert len(top) == 2
        assert top[token] == logprob


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_lm_eval_asks(client, engine, tokenizer, max_tokens):
    """It reads an entry for each token of the prompt, and drops the last one if there was a new token."""
    ids = tokenizer.encode("A list is a mutable sequence")
    body = {"prompt": [ids, ids[:3]], "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0}
    answer = complete(client, **body, seed=1234)
    for choice, prompt in zip(answer["choices"], (ids, ids[:3]), strict=True):
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["tokens"][: len(prompt)] == [tokenizer.decode([token]) for token in prompt]
        assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
        for token, logprob, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == logprob
            assert logprob <= max(top.values())
        assert choice["text"].startswith(tokenizer.decode(prompt))
        assert (choice["text"] == tokenizer.decode(prompt)) == (max_tokens == 0)
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_no_new_tokens_without_echo(client):
    answer = complete(client, prompt=PROMPT, max_tokens=0, logprobs=1)
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["logprobs"]["tokens"] == []
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_without_logprobs(client):
    choice = complete(client, prompt=PROMPT, max_tokens=2, echo=True)["choices"][0]
    assert choice["text"].startswith(PROMPT)
    assert len(choice["text"]) > len(PROMPT)
    assert choice["logprobs"] is None


def test_tokens_that_are_no_whole_characters_have_names_of_their_own(client, engine, tokenizer):
    """Clients take the names as keys."""
    engine.script = tokenizer.encode("🌍é")
    assert len(engine.script) > 2
    choice = complete(client, prompt=PROMPT, max_tokens=len(engine.script), logprobs=0)["choices"][0]
    assert choice["text"] == "🌍é"
    data = b"".join(
        name.encode() if not name.startswith("bytes:") else bytes.fromhex(name[6:].replace("\\x", ""))
        for name in choice["logprobs"]["tokens"]
    )
    assert data.decode() == "🌍é"
    assert any(name.startswith("bytes:\\x") for name in choice["logprobs"]["tokens"])
    assert choice["logprobs"]["text_offset"][0] == 0
    assert choice["logprobs"]["text_offset"][-1] == 1


def test_minus_infinity_is_a_number_in_json(client, engine, monkeypatch):
    original = engine.logprobs
    monkeypatch.setattr(engine, "logprobs", lambda *a: original(*a) - float("inf"))
    answer = complete(client, prompt=PROMPT, max_tokens=1, logprobs=1)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_stop_strings_end_a_text(client, engine, tokenizer):
    engine.script = tokenizer.encode("one two three four")
    answer = complete(client, prompt=PROMPT, max_tokens=30, stop=["zzz", " thr"])
    assert answer["choices"][0]["text"] == "one two"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert complete(client, prompt=PROMPT, max_tokens=30, stop=" two")["choices"][0]["text"] == "one"


def test_the_end_token_stops(client, engine, tokenizer):
    engine.script = [*tokenizer.encode("one"), 2550]
    answer = complete(client, prompt=PROMPT, max_tokens=30)
    assert answer["choices"][0]["text"] == "one"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(engine.script)


def test_stream_is_the_same_answer_in_parts(client, engine, tokenizer):
    engine.script = tokenizer.encode("wörld 🌍 — ok")
    body = {"prompt": [PROMPT, "The"], "max_tokens": len(engine.script), "seed": 2, "n": 2, "logprobs": 1, "echo": True}
    whole = complete(client, **body)
    values = stream(client, **body, stream_options={"include_usage": True})
    assert len({value["id"] for value in values}) == 1
    *parts, last = values
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(part["usage"] is None and part["object"] == "text_completion" for part in parts)
    for index, choice in enumerate(whole["choices"]):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert "\ufffd" not in choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, entries in choice["logprobs"].items():
            assert [entry for part in mine for entry in part["logprobs"][name]] == entries


def test_usage_in_every_event(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    values = stream(client, prompt=PROMPT, max_tokens=4, stream_options=options, logprobs=0)
    assert [value["usage"]["completion_tokens"] for value in values] == [1, 2, 3, 4, 4]
    assert "usage" not in stream(client, prompt=PROMPT, max_tokens=1)[0]


def test_ends_of_lines_stay_in_their_event(client, engine, tokenizer):
    """Clients that split lines as Python does would cut an event at U+2028."""
    text = "a\nb\r\nc\u2028d\u0085e"
    engine.script = tokenizer.encode(text)
    response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": len(engine.script), "stream": True})
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == text


def test_options_reach_the_engine(client, engine):
    complete(
        client, prompt=PROMPT, max_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-1, n=2, min_tokens=2,
        frequency_penalty=0.5, presence_penalty=-0.5, repetition_penalty=1.5, logit_bias={"5": -100, "6": 2.5},
        stop=["a", "b"], stop_token_ids=[7], cache_salt="mine", logprobs=3, echo=True,
    )  # fmt: skip
    request = engine.requests[-1]
    assert request.config == GenerationConfig(
        max_new_tokens=7, do_sample=True, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, min_new_tokens=2,
        frequency_penalty=0.5, presence_penalty=-0.5, repetition_penalty=1.5, logit_bias={5: -100.0, 6: 2.5},
        stop_strings=("a", "b"), num_return_sequences=2, eos_token_id=(2550, 2553, 7), pad_token_id=2551,
    )  # fmt: skip
    assert (request.seed, request.cache_salt, request.timeout) == (2**32 - 1, "mine", 20.0)
    assert (request.top_logprobs, request.prompt_logprobs, request.constraint) == (3, 3, None)


def test_defaults_are_openais(client, engine):
    complete(client, prompt=PROMPT)
    request = engine.requests[-1]
    expected = GenerationConfig(
        max_new_tokens=16, do_sample=True, temperature=1, eos_token_id=(2550, 2553), pad_token_id=2551
    )
    assert request.config == expected
    assert (request.seed, request.cache_salt, request.top_logprobs, request.prompt_logprobs) == (None, "", None, None)


def test_the_checkpoints_options_are_defaults(make_client, engine, settings):
    defaults = settings.defaults.replace({"do_sample": True, "temperature": 0.3, "top_p": 0.8, "max_new_tokens": 9})
    client = make_client(defaults=defaults)
    complete(client, prompt=PROMPT)
    config = engine.requests[-1].config
    assert (config.temperature, config.top_p, config.max_new_tokens) == (0.3, 0.8, 16)
    complete(client, prompt=PROMPT, temperature=0.7, top_p=1)
    assert (engine.requests[-1].config.temperature, engine.requests[-1].config.top_p) == (0.7, 1)
    complete(client, prompt=PROMPT, temperature=0)
    config = engine.requests[-1].config
    assert (config.do_sample, config.temperature, config.top_p) == (False, None, None)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-8])
def test_low_temperatures_are_greedy(client, engine, temperature):
    complete(client, prompt=PROMPT, temperature=temperature, top_p=0.5, top_k=3)
    assert not engine.requests[-1].config.do_sample


def test_ignore_eos_leaves_the_requests_stop_ids(client, engine):
    complete(client, prompt=PROMPT, ignore_eos=True, stop_token_ids=[9])
    assert engine.requests[-1].config.eos_token_id == (9,)


def test_more_tokens_than_fit(client, tokenizer):
    ids = [5] * 1020
    assert complete(client, prompt=ids)["usage"]["completion_tokens"] == 4
    assert complete(client, prompt=ids, max_tokens=4)["usage"]["completion_tokens"] == 4
    response = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 5})
    refused(response, 400, "1020", "5", "1024", param="max_tokens", code="context_length_exceeded")
    for prompt in ([5] * 1024, "word " * 1100, "x" * 10**6):
        response = client.post("/v1/completions", json={"prompt": prompt})
        refused(response, 400, param=response.json()["error"]["param"], code="context_length_exceeded")
