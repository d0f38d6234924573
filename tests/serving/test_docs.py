"""docs/serving.md has every field, route, metric and option."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dbrx_jax.cli.options import LoadOptions
from dbrx_jax.cli.serve import Serve
from dbrx_jax.serving import protocol
from tests.serving.test_routes import metrics

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
NAMES = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.mark.parametrize("body", [protocol.CompletionBody, protocol.ChatBody, protocol.StructuredOutputs])
def test_fields(body):
    assert {field.alias or name for name, field in body.model_fields.items()} <= NAMES
    assert {*protocol.IGNORED, *protocol.REFUSED, *protocol.StreamOptions.model_fields} <= NAMES


def test_routes_and_metrics(client):
    routes = set(client.app.openapi()["paths"]) | {"/", "/openapi.json"}
    named = {name.removeprefix("POST ").removeprefix("GET ").replace("NAME", "{name}") for name in NAMES}
    assert routes <= named
    names = {name for name, *_ in metrics(client) if not name.endswith("_created")}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in names} <= NAMES


def test_options():
    loading = {field.name for field in dataclasses.fields(LoadOptions)} - {"checkpoint"}
    options = {field.name for field in dataclasses.fields(Serve)} - {"checkpoint"}
    assert {f"--{name.replace('_', '-')}" for name in options | loading} <= NAMES


def test_curl_examples(client):
    """Their bodies are answered."""
    bodies = re.findall(r"curl .*?(/v1/\S+) -H .*?\\\n\s+-d '(.*)'", PAGE)
    assert len(bodies) == 2
    for path, body in bodies:
        assert client.post(path, json=json.loads(body)).status_code == 200
