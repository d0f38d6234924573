"""Fuzzing of bodies: whatever a client sends gets an answer or a refusal, and no failure of the server."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbrx_jax.serving import protocol
from tests.serving.helpers import events

PATHS = {
    "/v1/completions": protocol.CompletionBody,
    "/v1/chat/completions": protocol.ChatBody,
    "/tokenize": protocol.TokenizeBody,
    "/detokenize": protocol.DetokenizeBody,
}
USER = {"role": "user", "content": [{"type": "text", "text": "é"}]}
# Of most bodies, so that they come as far as the engine.
USUAL = {
    "prompt": st.sampled_from(["A list", ["x", "y"], [5, 6, 7], [[5], [6, 7]], "🌍\ud800", "<|im_end|>"]),
    "messages": st.sampled_from([[USER], [{"role": "system", "content": ""}, USER]]),
    "tokens": st.lists(st.integers(0, 2559), max_size=4),
    "max_tokens": st.integers(1, 4),
    "max_completion_tokens": st.none(),
    "min_tokens": st.none() | st.integers(0, 2),
    "n": st.none() | st.integers(1, 3),
    "model": st.sampled_from(["dbrx-demo", None]),
    "logit_bias": st.none() | st.dictionaries(st.sampled_from(["1", "2559"]), st.floats(-100, 100), max_size=2),
    "stop_token_ids": st.none() | st.lists(st.integers(0, 2559), max_size=2),
    "guided_json": st.none(), "guided_regex": st.none(), "guided_choice": st.none(), "structured_outputs": st.none(),
    "response_format": st.none() | st.just({"type": "text"}), "tools": st.none(), "tool_choice": st.none(),
    "logprobs": st.none(), "top_logprobs": st.none(), "stream_options": st.none(), "continue_final_message": st.none(),
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OTHER_FIELDS = st.dictionaries(
    st.sampled_from([*protocol.IGNORED, *protocol.REFUSED]) | st.text(max_size=8), JSON, max_size=2
)


def values(schema, definitions):
    """Values that a JSON schema allows."""
    if "$ref" in schema:
        return values(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return st.one_of([values(one, definitions) for one in schema["anyOf"]])
    match schema.get("type"):
        case "integer":
            low = int(schema.get("minimum", -5))
            high = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else None
            return st.integers(low, low + 30) | st.integers(low, None if high is None else int(high))
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "array":
            return st.lists(values(schema["items"], definitions), max_size=3)
        case "object":
            fields = {name: values(one, definitions) for name, one in schema.get("properties", {}).items()}
            required = {name: fields.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(required, optional=fields)
        case "string":
            return st.text(max_size=8)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return JSON


def bodies(path):
    """Bodies of a route: usual values for most fields, any allowed value for some, and any JSON for few."""
    schema = PATHS[path].model_json_schema()
    fields = schema["properties"]
    allowed = {name: values(one, schema.get("$defs", {})) for name, one in fields.items()}
    usual = {name: USUAL.get(name, allowed[name]) for name in fields}
    required = {name: usual.pop(name) for name in schema.get("required", ())}
    one_allowed = st.sampled_from(sorted(fields)).flatmap(lambda name: st.tuples(st.just(name), allowed[name]))
    one_any = st.tuples(st.sampled_from(sorted(fields)), JSON)
    changes = st.lists(one_allowed, max_size=2) | st.lists(one_allowed | one_any, max_size=2)
    few = st.just({}) | st.just({}) | OTHER_FIELDS
    return st.builds(
        lambda body, changed, other: {**body, **dict(changed), **other},
        st.fixed_dictionaries(required, optional=usual), changes, few,
    )  # fmt: skip


class Fuzzer:
    """Sends bodies to the routes and checks the answers.

    Attributes:
      statuses: of all answers.
    """

    def __init__(self, client):
        self._client, self.statuses = client, []

    def check(self, path, body):
        begin = time.monotonic()
        content = json.dumps(body)
        response = self._client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert time.monotonic() - begin < 5
        self.statuses.append(response.status_code)
        if response.status_code != 200:
            assert response.status_code in (400, 404), response.text
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
        elif "v1" in path:
            self._check_answer(body, response)

    def _check_answer(self, body, response):
        prompt = body.get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        num_choices = num_prompts * (body.get("n") or 1)
        if body.get("stream"):
            choices = [choice for value in events(response.text) for choice in value["choices"]]
        else:
            answer = response.json()
            choices = answer["choices"]
            usage = answer["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        ends = [choice["index"] for choice in choices if choice["finish_reason"] is not None]
        assert sorted(ends) == list(range(num_choices))


def run(client, max_examples):
    fuzzer = Fuzzer(client)
    for path in PATHS:

        @settings(max_examples=max_examples, suppress_health_check=list(HealthCheck))
        @given(bodies(path))
        def check(body):
            fuzzer.check(path, body)  # noqa: B023  called before the path changes

        check()
    assert fuzzer.statuses.count(200) > len(fuzzer.statuses) // 4
    assert fuzzer.statuses.count(400) > len(fuzzer.statuses) // 10


def test_any_body_gets_an_answer(make_client):
    run(make_client(max_model_len=64), 75)


@pytest.mark.slow
def test_many_bodies_get_an_answer(make_client):
    """DBRX_FUZZ_BODIES=24000 is thorough, and takes four minutes."""
    run(make_client(max_model_len=64), int(os.environ.get("DBRX_FUZZ_BODIES", 4000)) // len(PATHS))


def test_any_bytes_get_an_answer(client):
    letters = '{}[]",:0123456789.eE-+truefalsn\\u "prompt"'

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=30) | st.text(letters, max_size=40).map(str.encode))
    def check(content):
        response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400), response.text

    check()
