"""Tests of EleutherAI's lm-eval against the server: it gets exact log-likelihoods, and the texts of generate.

It runs in the Python named by DBRX_LM_EVAL_PYTHON, which .ci/run makes: lm-eval[api] 0.4.13.
"""

import json
import os
import subprocess

import pytest
import yaml

from tests.serving.end_to_end.test_completions import MODEL, model_logprobs

KEY = "key-of-lm-eval"
DOCUMENTS = (
    {"question": "A list is", "choices": ["a string", "a number, or Ünïcödé 🌍"], "answer": 0},
    {"question": "The function returns", "choices": ["the string", "the value of", "1"], "answer": 1},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "None"], "answer": 0},
)
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[answer]}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n", ", or"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1},
        "metric_list": [{"metric": "exact_match"}],
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("DBRX_LM_EVAL_PYTHON" not in os.environ, reason="DBRX_LM_EVAL_PYTHON names no Python"),
]


@pytest.fixture(scope="module")
def url(start):
    return start(api_keys=(KEY,))


@pytest.fixture
def evaluate(tmp_path):
    """A function that runs lm-eval, and returns its results by task, and its samples by task."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"demo_{name}"} | source | task))

    def evaluate(kind, url, tasks, *options, **model_args):
        args = {"base_url": url, "model": MODEL, "max_length": 1024} | model_args
        command = [
            os.environ["DBRX_LM_EVAL_PYTHON"], "-m", "lm_eval", "run", "--model", kind,
            "--model_args", ",".join(f"{name}={value}" for name, value in args.items()),
            "--tasks", ",".join(f"demo_{task}" for task in tasks), "--include_path", str(tmp_path),
            "--log_samples", "--output_path", str(tmp_path / "out"), *options,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        environment = {**os.environ, **offline, "OPENAI_API_KEY": KEY}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / "out" / MODEL
        (results,) = folder.glob("results_*.json")
        samples = {}
        for task in tasks:
            (file,) = folder.glob(f"samples_demo_{task}_*.jsonl")
            rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
            samples[task] = rows
        return json.loads(results.read_text())["results"], samples

    return evaluate


def log_likelihood(model, context, continuation):
    """The sum of a continuation's log-probabilities after a context, and whether each token is the most probable."""
    ids = [*context, *continuation]
    rows = model_logprobs(model, ids).astype(float)[len(context) - 1 : -1]
    is_greedy = all(row.argmax() == token for row, token in zip(rows, continuation, strict=True))
    return sum(row[token] for row, token in zip(rows, continuation, strict=True)), is_greedy


def cut(text):
    """A text up to the first of the strings that end it."""
    for stop in TASKS["words"]["generation_kwargs"]["until"]:
        text = text.partition(stop)[0]
    return text


def test_local_completions(evaluate, url, model, tokenizer, generated):
    """Several requests at once, with two prompts each."""
    address, model_args = f"{url}/v1/completions", {"auth_token": KEY, "num_concurrent": 4}
    results, samples = evaluate("local-completions", address, TASKS, "--batch_size", "2", **model_args)
    num_right, greedy = 0, set()
    for row, document in zip(samples["choices"], DOCUMENTS, strict=True):
        context, expected = tokenizer.encode(document["question"]), []
        for choice in document["choices"]:
            whole = tokenizer.encode(f"{document['question']} {choice}")
            expected.append(log_likelihood(model, context, whole[len(context) :]))
        got = [(float(value), is_greedy == "True") for ((value, is_greedy),) in row["resps"]]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
        greedy.update(is_greedy for _, is_greedy in got)
        num_right += max(range(len(expected)), key=expected.__getitem__) == document["answer"]
    assert greedy == {True, False}
    assert results["demo_choices"]["acc,none"] == num_right / len(DOCUMENTS)
    for row in samples["rolling"]:
        expected, _ = log_likelihood(model, [tokenizer.eos_token_id], tokenizer.encode(row["target"]))
        assert float(row["resps"][0][0]) == pytest.approx(expected, abs=1e-4)
    expected = [[[cut(generated(document["question"], 12)[0])]] for document in DOCUMENTS]
    assert [row["resps"] for row in samples["words"]] == expected


def test_local_chat_completions(evaluate, url, tokenizer, generated):
    address = f"{url}/v1/chat/completions"
    _, samples = evaluate("local-chat-completions", address, ["words"], "--apply_chat_template", num_concurrent=4)
    for row, document in zip(samples["words"], DOCUMENTS, strict=True):
        messages = [{"role": "user", "content": document["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert row["resps"] == [[cut(generated(prompt, 12)[0])]]
