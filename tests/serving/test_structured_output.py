"""Tests of structured output: requests reach the maker of constraints."""

import pytest

from dbrx_jax.errors import GenerationError
from tests.serving.helpers import complete, refused

URL, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture
def made():
    return []


@pytest.fixture
def maker(made):
    def make(kind, value):
        if value == "(":
            raise GenerationError("the pattern is not closed")
        made.append((kind, value))
        return f"constraint {len(made)}"

    return make


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", None)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            ("json_schema", SCHEMA),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
        ({"guided_json": '{"type": "null"}'}, ("json_schema", {"type": "null"})),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, ("choice", ["yes", "no"])),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, ("json_object", None)),
        ({"structured_outputs": {"regex": "b"}}, ("regex", "b")),
        ({"structured_outputs": {"choice": ["c"]}}, ("choice", ["c"])),
    ],
)
def test_constraints_reach_the_engine(make_client, engine, maker, made, fields, expected):
    client = make_client(maker)
    complete(client, CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=1, **fields)
    assert (made, engine.requests[-1].constraint) == ([expected], "constraint 1")
    complete(client, prompt=["x", "y"], max_tokens=1, **fields)
    assert made == [expected, expected]
    assert [request.constraint for request in engine.requests[-2:]] == ["constraint 2", "constraint 2"]


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {"json_object": False}}]
)
def test_no_constraint(make_client, engine, maker, made, fields):
    complete(make_client(maker), prompt="x", max_tokens=1, **fields)
    assert engine.requests[-1].constraint is None
    assert made == []


def test_wrong_constraints(make_client, maker):
    client = make_client(maker)

    def post(**fields):
        return client.post(URL, json={"prompt": "x", **fields})

    refused(post(guided_regex="("), 400, "guided_regex: the pattern is not closed", param="guided_regex")
    both = {"guided_regex": "a", "response_format": {"type": "json_object"}}
    refused(post(**both), 400, "response_format and guided_regex", param="response_format")
    form = {"type": "json_schema", "json_schema": {"name": "n"}}
    refused(post(response_format=form), 400, "schema", param="response_format")
    refused(post(guided_json="{"), 400, "guided_json: expected a JSON schema", param="guided_json")
    refused(post(structured_outputs={"grammar": "x"}), 400, "structured_outputs.grammar", param="structured_outputs")
    without = make_client().post(URL, json={"prompt": "x", "guided_regex": "a"})
    refused(without, 400, "not supported", param="guided_regex")
