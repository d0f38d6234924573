"""1,000 requests to a server's process over few blocks; a third go away, and some are malformed."""

import asyncio
import contextlib
import dataclasses
import json
import random
import signal
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest

from tests.engine.conftest import small_model
from tests.serving.small_server import serving
from tests.serving.test_disconnect import wait_for

pytestmark = pytest.mark.slow
NUM_REQUESTS, NUM_CLIENTS = 1000, 24
STOPS = ["th", "in", "e ", "(s"]
# Fields of requests, and the options of generate that are the same.
KINDS = {
    "greedy": ({"temperature": 0}, {}),
    "stop": ({"temperature": 0, "stop": STOPS}, {"stop_strings": STOPS}),
    "penalties": (
        {
            "temperature": 0,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.4,
            "presence_penalty": 0.3,
            "logit_bias": {"7": 4, "11": -50},
            "min_tokens": 3,
            "stop_token_ids": list(range(0, 2500, 90)),
        },
        {
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.4,
            "presence_penalty": 0.3,
            "logit_bias": {7: 4.0, 11: -50.0},
            "min_new_tokens": 3,
            "eos_token_id": [2550, 2553, *range(0, 2500, 90)],
        },
    ),
    "samples": (
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    ),
}
MALFORMED = [  # bodies of /v1/completions, with the answer's status
    (b"", 400),
    (b'{"prompt": "x"', 400),
    (b'{"prompt": "\xff"}', 400),
    (b"[" * 100_000, 400),
    ({"prompt": 5}, 400),
    ({"prompt": [1, 2, 2560]}, 400),
    ({"prompt": "x", "max_tokens": "ten"}, 400),
    ({"prompt": "x", "temprature": 1}, 400),
    ({"prompt": [5] * 1100}, 400),
    ({"prompt": "x", "max_tokens": 1024}, 400),
    ({"prompt": "x", "n": 7}, 400),
    ({"prompt": "x", "stop": [""]}, 400),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, 400),
    ({"prompt": "x", "guided_regex": "("}, 400),
    ({"prompt": "x", "model": "other"}, 404),
    ({"prompt": "x" * (5 << 20)}, 413),
]
BROKEN = [  # what is sent before the connection is closed
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: local",
    b"\x00\xff\r\n\r\n",
]


@dataclasses.dataclass
class Question:
    """A request without `stream` and `logprobs`, and the tokens of its prompt."""

    kind: str
    body: dict
    ids: list[int]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


def make_questions(tokenizer) -> list[Question]:
    """Returns questions of each kind. Some prompts end just before a block does, so that rows run out of blocks."""
    rng, questions = random.Random(7), []
    for kind, (fields, _) in KINDS.items():
        for number in range(12):
            length = rng.choice([rng.randrange(2, 40), rng.randrange(115, 128), rng.randrange(230, 256)])
            ids = [rng.randrange(2500) for _ in range(length)]
            body = {**fields, "max_tokens": 24}
            if kind == "samples":
                body |= {"seed": number, "n": 1 + number % 2}
            if number % 3:
                body["prompt"] = ids
            else:
                body["messages"] = [{"role": "user", "content": tokenizer.decode(ids[:60])}]
                ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
            questions.append(Question(kind, body, ids))
    return questions


def expected_answers(model, tokenizer, questions) -> list[list[tuple]]:
    """Returns the text, the reason of the end, and the log-probabilities of each of a question's completions."""
    answers: list[list[tuple]] = [[] for _ in questions]
    for kind, (_, options) in KINDS.items():
        chosen = [number for number, question in enumerate(questions) if question.kind == kind]
        groups = [[number] for number in chosen] if kind == "samples" else [chosen]
        for group in groups:
            body, prompts = questions[group[0]].body, [questions[number].ids for number in group]
            out = model.generate(
                prompts,
                tokenizer=tokenizer,
                max_new_tokens=24,
                cache_length=384,
                batch_size=2,
                seed=body.get("seed"),
                num_return_sequences=body.get("n", 1),
                output_logprobs=True,
                return_dict_in_generate=True,
                **options,
            )
            new = out.sequences[:, max(map(len, prompts)) :]
            for row, (tokens, logprobs) in enumerate(zip(new, out.logprobs, strict=True)):
                count = int(np.isfinite(logprobs).sum())
                text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
                reason = "stop" if tokens[count - 1] in options.get("eos_token_id", (2550, 2553)) else "length"
                if kind == "stop" and (found := [text.index(stop) for stop in STOPS if stop in text]):
                    text, reason = text[: min(found)], "stop"
                answers[group[row // body.get("n", 1)]].append((text, reason, logprobs[:count]))
    return answers


class GoesAway(Exception):
    """The client has read enough."""


async def ask(client, question, stream, logprobs, num_lines=None) -> list[tuple]:
    """Asks a question; returns the text, the reason of the end and the log-probabilities of each completion.

    Raises:
      GoesAway: after `num_lines` of a stream.
    """
    is_chat = "messages" in question.body
    body = {**question.body, "stream": stream}
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
    if not stream:
        response = await client.post(question.path, json=body)
        assert response.status_code == 200, response.text
        parts = [response.json()]
    else:
        parts = []
        async with client.stream("POST", question.path, json=body) as response:
            assert response.status_code == 200
            lines = []
            async for line in response.aiter_lines():
                lines += [line] if line else []
                if len(lines) == num_lines:
                    raise GoesAway
        assert lines.pop() == "data: [DONE]"
        parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    answers = [["", None, []] for _ in range(question.body.get("n", 1))]
    for choice in (choice for part in parts for choice in part["choices"]):
        answer = answers[choice["index"]]
        message = choice.get("delta") or choice.get("message") or choice
        answer[0] += message.get("content" if is_chat else "text") or ""
        answer[1] = choice["finish_reason"] or answer[1]
        found = choice["logprobs"] or {}
        answer[2] += (
            [entry["logprob"] for entry in found.get("content") or ()] if is_chat else found.get("token_logprobs", [])
        )
    return [tuple(answer) for answer in answers]


async def send_malformed(client, number) -> None:
    """Sends a body that is refused, or no complete request."""
    if number < len(MALFORMED):
        body, status = MALFORMED[number]
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status, (number, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return
    address = urlsplit(str(client.base_url))
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(BROKEN[number - len(MALFORMED)])
    await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def send_all(server, questions) -> tuple[list, list[float]]:
    """Sends all requests; returns what was asked and answered, and the server's memory as time goes on."""
    rng, answers, memory = random.Random(3), [], []

    async def send_some(numbers):
        for number in numbers:
            question = rng.randrange(len(questions))
            stream, logprobs, delay = rng.random() < 0.5, rng.random() < 0.3, rng.random()
            if number % 10 == 9:
                await send_malformed(client, number // 10 % (len(MALFORMED) + len(BROKEN)))
            elif number % 3 == 0:
                with contextlib.suppress(TimeoutError, GoesAway):
                    async with asyncio.timeout(None if stream else delay):
                        await ask(client, questions[question], stream, logprobs, num_lines=1 + int(20 * delay))
            else:
                answers.append((question, logprobs, await ask(client, questions[question], stream, logprobs)))
            if number % 20 == 0:
                memory.append(server.memory())

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        numbers = iter(range(NUM_REQUESTS))
        await asyncio.gather(*[send_some(numbers) for _ in range(NUM_CLIENTS)])
    return answers, memory


def test_every_answer_is_that_of_generate_and_nothing_is_lost(tokenizer):
    questions = make_questions(tokenizer)
    with serving(blocks=8) as server:
        assert server.is_idle()
        files = server.num_files()
        answers, memory = asyncio.run(send_all(server, questions))
        wait_for(server.is_idle)
        wait_for(lambda: server.num_files() <= files)
        assert server.metric("dbrx_jax:compilations_after_warmup_total") == 0
        assert server.metric("vllm:num_preemptions_total") > 10
        assert server.metric("vllm:prefix_cache_hits_total") > 0
        assert not [line for line in server.log if line["status"] >= 500]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert len(answers) > 0.5 * NUM_REQUESTS
    half = len(memory) // 2  # over 4,000 requests the last 2,500 add nothing
    assert max(memory[half:]) - memory[half] < 8
    expected = expected_answers(small_model(), tokenizer, questions)
    for number, has_logprobs, got in answers:
        for (text, reason, logprobs), (wanted, wanted_reason, wanted_logprobs) in zip(
            got, expected[number], strict=True
        ):
            assert (text, reason) == (wanted, wanted_reason), questions[number]
            if has_logprobs:
                np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)
