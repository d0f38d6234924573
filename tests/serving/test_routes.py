"""Tests of the routes beside completions: models, tokens, health, metrics, the page, and the access log."""

import base64
import hashlib
import json
import re
from importlib import resources

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dbrx_jax.serving import page
from tests.serving.helpers import chat, complete, refused


def metrics(client):
    """All samples by name and labels but the model's."""
    samples = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name"))
            samples[(sample.name, *labels)] = sample.value
    return samples


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("dbrx-demo", "model", "dbrx-jax")
    assert model["max_model_len"] == 1024
    assert client.get("/v1/models/dbrx-demo").json() == model
    refused(client.get("/v1/models/org/other"), 404, "'org/other'", param="model", code="model_not_found")


def test_tokenize_and_back(client, tokenizer):
    text = "A list — ünd <|endoftext|>"
    answer = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False, "return_token_strs": True})
    ids = tokenizer.encode(text)
    assert answer.json() == {
        "count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids)
    }  # fmt: skip
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert client.post("/detokenize", json={"tokens": [2550]}).json() == {"prompt": "<|endoftext|>"}
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert client.post("/tokenize", json={"messages": messages}).json()["tokens"] == ids
    refused(client.post("/detokenize", json={"tokens": [2560]}), 400, "2560", param="tokens")
    refused(client.post("/tokenize", json={}), 400, "prompt or messages", param="prompt")


def test_lm_evals_remote_tokenizer(client, tokenizer):
    """It asks for the texts of special tokens, and then for their ids."""
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert info["chat_template"] == tokenizer.chat_template
    assert client.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"] == [2550]


def test_health_and_version(client, engine):
    from importlib.metadata import version

    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/version").json() == {"version": version("dbrx-jax")}
    client.state.draining = True
    assert client.get("/health").status_code == 503
    client.state.draining = False
    engine.die(RuntimeError("x"))
    assert client.get("/health").status_code == 503


def test_metrics(client, engine, tokenizer):
    engine.script = [*tokenizer.encode("one two"), 2553]
    chat(client, max_tokens=20)
    complete(client, prompt="x", max_tokens=2, n=3)
    client.post("/v1/completions", json={})
    client.get("/nowhere")
    values = metrics(client)
    assert values[("vllm:num_requests_running",)] == values[("vllm:num_requests_waiting",)] == 0
    assert values[("vllm:kv_cache_usage_perc",)] == 0.25
    assert values[("vllm:prompt_tokens_total",)] == sum(len(request.prompt) for request in engine.requests)
    assert values[("vllm:generation_tokens_total",)] == len(engine.script) + 6
    assert values[("vllm:prefix_cache_queries_total",)] == 7
    assert values[("vllm:prefix_cache_hits_total",)] == 3
    assert values[("vllm:num_preemptions_total",)] == 2
    assert values[("vllm:spec_decode_num_draft_tokens_total",)] == 12
    assert values[("vllm:spec_decode_num_accepted_tokens_total",)] == 9
    assert values[("dbrx_jax:compilations_after_warmup_total",)] == 1
    assert values[("vllm:request_success_total", "stop")] == 1
    assert values[("vllm:request_success_total", "length")] == 3
    assert values[("vllm:request_success_total", "abort")] == values[("vllm:request_success_total", "error")] == 0
    assert values[("vllm:time_to_first_token_seconds_count",)] == 2
    assert values[("vllm:e2e_request_latency_seconds_count",)] == 2
    assert values[("vllm:inter_token_latency_seconds_count",)] == len(engine.script) - 1 + 3
    assert values[("http_requests_total", "/v1/completions", "POST", "200")] == 1
    assert values[("http_requests_total", "/v1/completions", "POST", "400")] == 1
    assert values[("http_requests_total", "none", "GET", "404")] == 1
    engine.fail = RuntimeError("x")
    client.post("/v1/completions", json={"prompt": "x", "n": 2})
    assert metrics(client)[("vllm:request_success_total", "error")] == 2


def test_access_log_has_no_prompts(make_client):
    lines = []
    client = make_client(write_log=lines.append)
    response = client.post("/v1/completions?key=secret", json={"prompt": "secret", "max_tokens": 3, "user": "secret"})
    assert "secret" not in "".join(lines)
    line = json.loads(lines[0])
    assert line.pop("seconds") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line.pop("request_id") == response.headers["x-request-id"]
    assert line == {
        "client": "testclient", "method": "POST", "path": "/v1/completions", "status": 200, "prompt_tokens": 3,
        "completion_tokens": 3,
    }  # fmt: skip
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, "stream": True})
    assert json.loads(lines[1])["completion_tokens"] == 4
    assert client.get("/version", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/version", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_page(client, tmp_path, monkeypatch):
    html = "<html><style>b{}</style><script>alert(1)</script><script type='module'>\nlet a</script></html>"
    (tmp_path / "page").mkdir()
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    refused(client.get("/"), 404, "/v1", code="not_found")
    (tmp_path / "page" / "index.html").write_text(html)
    response = client.get("/")
    assert (response.status_code, response.text) == (200, html)
    policy = response.headers["content-security-policy"]
    for text in ("alert(1)", "\nlet a", "b{}"):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "script-src 'none'" in page.content_security_policy("<p>")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_pages_that_load_scripts_from_the_network(client, path):
    assert client.get(path).status_code == 404
