"""Tests of tools: the calls in a model's text, and requests that offer tools."""

import copy
import json

import pytest

from dbrx_jax.serving.tools import ToolParser
from tests.serving.helpers import complete, refused, stream

URL = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}Call with <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}{% endfor %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'


@pytest.fixture
def tool_client(make_client, tokenizer):
    other = copy.copy(tokenizer)
    other.chat_template = TEMPLATE
    return make_client(tokenizer=other)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("text", ["", "Well. ", "a < b <tool"])
def test_calls_are_found_in_pieces(text, size):
    parser, outside, calls = ToolParser(), "", []
    whole = text + CALL + "\n" + CALL + "\n end\n\nof it<tool_ca"
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    for number, piece in enumerate(pieces):
        new, found = parser.push(piece, is_last=number == len(pieces) - 1)
        outside, calls = outside + new, calls + found
    assert outside == text + " end\n\nof it<tool_ca"
    assert [call["index"] for call in calls] == [0, 1]
    assert {call["function"]["name"] for call in calls} == {"add"}
    assert json.loads(calls[1]["function"]["arguments"]) == {"a": 1, "b": "ü"}
    assert calls[0]["id"] != calls[1]["id"]


@pytest.mark.parametrize("text", ["<tool_call>{no json}</tool_call>", "<tool_call>[1]</tool_call>", "<tool_call>{"])
def test_what_is_no_call_stays_text(text):
    assert ToolParser().push(text + "x", is_last=True) == (text + "x", [])


def test_tool_calls_in_an_answer(tool_client, engine, tokenizer):
    engine.script = [*tokenizer.encode("So: " + CALL), 2553]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "max_tokens": 300}
    choice = complete(tool_client, URL, **body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So: "
    (call,) = choice["message"]["tool_calls"]
    assert set(call) == {"id", "type", "function"}
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}
    prompt = tokenizer.decode(engine.requests[-1].prompt)
    assert '"name": "add"' in prompt
    assert prompt.endswith("Call with <tool_call>[user]x")
    deltas = [value["choices"][0]["delta"] for value in stream(tool_client, URL, **body)]
    (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed[0]["function"] == call["function"]
    assert streamed[0]["index"] == 0
    assert "".join(delta.get("content", "") for delta in deltas) == "So: "
    assert complete(tool_client, URL, **body, tool_choice="none")["choices"][0]["finish_reason"] == "stop"
    assert "add" not in tokenizer.decode(engine.requests[-1].prompt)


def test_earlier_calls_reach_the_template_as_objects(tool_client, engine, tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 17}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "18"},
    ]
    complete(tool_client, URL, messages=messages, max_tokens=1)
    assert tokenizer.decode(engine.requests[-1].prompt) == "[user]x[assistant]17[tool]18"


def test_a_template_without_tools(client, engine):
    user = {"role": "user", "content": "x"}
    refused(client.post(URL, json={"messages": [user], "tools": [TOOL]}), 400, "chat template", param="tools")
    result = {"role": "tool", "tool_call_id": "1", "content": "18"}
    refused(client.post(URL, json={"messages": [user, result]}), 400, "chat template", param="messages")
    complete(client, URL, messages=[user], tools=[TOOL], tool_choice="none", max_tokens=1)
    assert len(engine.requests) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sub"}}])
def test_tools_that_must_be_called(make_client, tokenizer, engine, choice):
    """The prompt ends with the beginning of a call, and the rest is constrained to be one."""
    other, made = copy.copy(tokenizer), []
    other.chat_template = TEMPLATE
    client = make_client(lambda *arguments: made.append(arguments), tokenizer=other)
    sub = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "$defs": {"x": {}}}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL, sub], "tool_choice": choice}
    text = '{"name": "sub", "arguments": {"a": "<tool_call>"}}'
    engine.script = [*tokenizer.encode(text), 2553]
    answer = complete(client, URL, **body, max_tokens=300)["choices"][0]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "sub", "arguments": '{"a": "<tool_call>"}'}
    assert tokenizer.decode(engine.requests[-1].prompt).endswith("[user]x<tool_call>\n")
    ((kind, schema),) = made
    assert kind == "json_schema"
    calls = [one["properties"] for one in schema["anyOf"]]
    assert [call["name"]["const"] for call in calls] == (["add", "sub"] if choice == "required" else ["sub"])
    assert calls[-1]["arguments"] == {"type": "object", "$defs": {"x": {}}, "$id": f"tool:{len(calls) - 1}"}
    deltas = [value["choices"][0]["delta"] for value in stream(client, URL, **body, max_tokens=300)]
    (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed[0]["function"]["name"] == "sub"
    cut = complete(client, URL, **body, max_tokens=3)["choices"][0]
    assert (cut["finish_reason"], "tool_calls" in cut["message"]) == ("length", False)
    assert text.startswith(cut["message"]["content"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "other"}}])
def test_tools_that_must_be_called_and_are_not_there(client, tool_client, choice):
    body = {"messages": [{"role": "user", "content": "x"}], "tool_choice": choice}
    refused(client.post(URL, json=body), 400, "there are no tools", param="tool_choice")
    form = {"response_format": {"type": "json_object"}} if choice == "required" else {}
    reason = "give one of them" if form else "no tool with this name"
    param = "response_format" if form else "tool_choice"
    refused(tool_client.post(URL, json={**body, **form, "tools": [TOOL]}), 400, reason, param=param)
    bad = {**body, "tool_choice": "auto", "tools": [{"type": "web_search"}]}
    refused(tool_client.post(URL, json=bad), 400, "tools[0]", param="tools")
    bad = {**body, "tool_choice": "required", "tools": [{**TOOL, "function": {"name": "add", "parameters": [1]}}]}
    refused(tool_client.post(URL, json=bad), 400, "tools[0].function.parameters", param="tools")
