"""Readers of the servers' answers."""

import json


def complete(client, path="/v1/completions", **body):
    """Posts a body and returns the answer, which must be 200."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client, text="Hi", **body):
    return complete(client, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)


def refused(response, status, *fragments, param=None, code=None):
    """Asserts OpenAI's error object with these fragments in its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for fragment in fragments:
        assert fragment in error["message"]
    assert (error["param"], error["code"]) == (param, code)
    return error


def events(text):
    """Returns the values of a stream's events; the last is [DONE], which is left out."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    values = [block.removeprefix("data: ") for block in blocks]
    assert values.pop() == "[DONE]"
    return [json.loads(value) for value in values]


def stream(client, path="/v1/completions", **body):
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)
