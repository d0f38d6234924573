"""Tests of chats: OpenAI's client gets what generate gives after the chat template, and JSON that fits its schema."""

import asyncio
import copy
import json
from typing import Annotated, Literal

import jsonschema
import numpy as np
import openai
import pydantic
import pytest

from tests.serving.end_to_end.test_completions import MODEL, model_logprobs
from tests.serving.test_tools import TEMPLATE

pytestmark = pytest.mark.slow  # the engine compiles for a minute
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
OPTIONS = {"model": MODEL, "messages": MESSAGES}


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)


def test_answer_is_that_of_generate(client, generated, prompt):
    (expected,) = generated(prompt, 50)
    answer = client.chat.completions.create(**OPTIONS, temperature=0, max_completion_tokens=50)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == (expected, "assistant")
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 50 else "stop")
    assert answer.usage.prompt_tokens == len(prompt)
    options = {"temperature": 0, "max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(**OPTIONS, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == choice.finish_reason
    assert (last.choices, last.usage.total_tokens) == ([], answer.usage.total_tokens)


def test_samples_side_by_side(client, generated, prompt):
    """Several choices of one stream, and several requests of one asynchronous client."""
    options = {"do_sample": True, "temperature": 0.9, "seed": 3, "num_return_sequences": 2}
    expected = generated(prompt, 9, **options)
    texts = [""] * 2
    for part in client.chat.completions.create(**OPTIONS, temperature=0.9, seed=3, n=2, max_tokens=9, stream=True):
        texts[part.choices[0].index] += part.choices[0].delta.content or ""
    assert texts == expected
    assert len(set(texts)) > 1

    async def ask():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            create = other.chat.completions.create
            requests = (create(**OPTIONS, temperature=0.9, seed=seed, max_tokens=9) for seed in (3, 4, 5, 3))
            return [answer.choices[0].message.content for answer in await asyncio.gather(*requests)]

    several = asyncio.run(ask())
    assert several[0] == several[3] == expected[0]
    assert several[1] == generated(prompt, 9, **options | {"seed": 4})[0]


def test_logprobs(client, model, prompt):
    options = {"logprobs": True, "top_logprobs": 2, "temperature": 0, "max_tokens": 8}
    entries = client.chat.completions.create(**OPTIONS, **options).choices[0].logprobs.content
    ids = model.generate([prompt], max_new_tokens=8)[0]
    expected = model_logprobs(model, ids)[len(prompt) - 1 : -1]
    drawn = [expected[i, token] for i, token in enumerate(ids[len(prompt) :])]
    np.testing.assert_allclose([entry.logprob for entry in entries], drawn, atol=1e-4)
    top = [[one.logprob for one in entry.top_logprobs] for entry in entries]
    np.testing.assert_allclose(top, -np.sort(-expected, axis=1)[:, :2], atol=1e-4)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)
    parts = list(client.chat.completions.create(**OPTIONS, **options, stream=True))
    streamed = [entry for part in parts if (logprobs := part.choices[0].logprobs) for entry in logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_second_question_finds_the_first_in_the_cache(client):
    messages = [{"role": "user", "content": "List these: " + ", ".join(map(str, range(60)))}]
    options = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    first = client.chat.completions.create(**options, messages=messages)
    assert (first.usage.prompt_tokens_details.cached_tokens, first.usage.prompt_tokens > 130) == (0, True)
    messages += [first.choices[0].message, {"role": "user", "content": "Again?"}]
    second = client.chat.completions.create(**options, messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens // 128 * 128


class Animal(pydantic.BaseModel):
    """The shape that an answer must have."""

    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    legs: Annotated[int, pydantic.Field(ge=0, le=4)]
    is_tame: bool
    names: Annotated[list[Literal["Tom", "Ada"]], pydantic.Field(max_length=2)]


def test_json_schema(client):
    """The client makes the schema of a class, and reads the answer as one of its objects."""
    for seed in range(3):
        answer = client.chat.completions.parse(**OPTIONS, response_format=Animal, seed=seed, temperature=1.0)
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Animal)
        jsonschema.validate(json.loads(answer.choices[0].message.content), Animal.model_json_schema())
    greedy = {"temperature": 0, "response_format": {"type": "json_object"}, "max_tokens": 30}
    answer = client.chat.completions.create(**OPTIONS, **greedy)
    assert answer.choices[0].message.content.lstrip().startswith("{")
    schema = {"type": "object", "properties": {"a": {"pattern": "(?=x)", "type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="response_format: json_schema"):
        client.chat.completions.create(**OPTIONS, response_format=form)


def test_choices(client):
    answer = client.chat.completions.create(**OPTIONS, extra_body={"guided_choice": ["certainly", "never"]})
    assert answer.choices[0].message.content in ("certainly", "never")
    assert answer.choices[0].finish_reason == "stop"


def test_tools_that_must_be_called(start, tokenizer):
    """The arguments match their schema, whose references are inside it."""
    other = copy.copy(tokenizer)
    other.chat_template = TEMPLATE
    schemas = {}
    for name, values in ("colour", ["red", "blue"]), ("size", [7, 8]):
        fields = {"properties": {"value": {"$ref": "#/$defs/it"}}, "required": ["value"]}
        schemas[name] = {"type": "object", "$defs": {"it": {"enum": values}}, "additionalProperties": False, **fields}
    tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in schemas.items()]
    client = openai.OpenAI(base_url=f"{start(tokenizer=other)}/v1", api_key="none", max_retries=0, timeout=300)
    called = set()
    for seed in range(5):
        options = {"tools": tools, "tool_choice": "required", "seed": seed, "temperature": 2.0}
        choice = client.chat.completions.create(**OPTIONS, **options).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        function = choice.message.tool_calls[0].function
        jsonschema.validate(json.loads(function.arguments), schemas[function.name])
        called.add(function.name)
    named = {"type": "function", "function": {"name": (set(schemas) - called or {"size"}).pop()}}
    choice = client.chat.completions.create(**OPTIONS, tools=tools, tool_choice=named).choices[0]
    assert choice.message.tool_calls[0].function.name == named["function"]["name"]
