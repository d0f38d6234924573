"""Tests of the chat page in Chromium, against a small server that streams what a test tells it to."""

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from importlib import resources

import pytest

from dbrx_jax.serving.page import content_security_policy

pytestmark = pytest.mark.slow
HTML = resources.files("dbrx_jax.serving").joinpath("page/index.html").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = object()  # in a reply: until the test releases it, or the client goes away
CUT = object()  # in a reply: the connection breaks
END = object()  # in a reply: it ends without a reason
NASTY = '<img src=x onerror="window.hit=1"><script>window.hit=1</script></p><b>&amp;'

POLICY = content_security_policy(HTML)


class Stub:
    """An ASGI application with the page and the two routes that it uses.

    Attributes:
      replies: one for each request of an answer, in order: (status, error, headers) or a list of pieces of text, WAIT,
        CUT, END, and events as dictionaries or bytes. "ok" is the answer when there are none left.
      bodies: of the requests for answers.
      keys: the header Authorization of every request to the API.
      key: the API key that requests need.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.replies, self.bodies, self.keys, self.key = [], [], [], None
        self.released, self.gone = threading.Event(), threading.Event()

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        if path == "/":
            headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", POLICY.encode())]
            return await _respond(send, 200, HTML.encode(), headers)
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        self.keys.append(key)
        if self.key and key != f"Bearer {self.key}":
            return await _error(send, 401, "give an API key")
        if path == "/v1/models":
            return await _respond(send, 200, json.dumps({"object": "list", "data": [{"id": "dbrx-test"}]}).encode())
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(json.loads(body))
        reply = self.replies.pop(0) if self.replies else ["ok"]
        if isinstance(reply, tuple):
            return await _error(send, *reply)
        await self._stream(reply, receive, send)

    async def _stream(self, pieces, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await _event(send, _choice({"role": "assistant", "content": ""}))
        for piece in pieces:
            if piece is CUT:
                raise ConnectionAbortedError
            if piece is END:
                return await send({"type": "http.response.body"})
            if piece is WAIT:
                if await self._wait(receive):
                    return
            else:
                await _event(send, _choice({"content": piece}) if isinstance(piece, str) else piece)
                await asyncio.sleep(0.002)
        await _event(send, _choice({}, "stop"))
        await _event(send, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 42}})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _wait(self, receive):
        """Returns once the test goes on; True if the client has gone."""
        while not self.released.is_set():
            try:
                message = await asyncio.wait_for(receive(), 0.02)
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                self.gone.set()
                return True
        return False


def _choice(delta, finish=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}


async def _event(send, value):
    body = value if isinstance(value, bytes) else f"data: {json.dumps(value)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _error(send, status, message, headers=()):
    await _respond(
        send, status, json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode(), headers
    )


async def _respond(send, status, body, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server():
    """The stub, and the address where it listens."""
    import uvicorn

    stub = Stub()
    config = uvicorn.Config(stub, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    process = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=process.run, args=([listener],))
        thread.start()
        yield stub, f"http://127.0.0.1:{listener.getsockname()[1]}"
        process.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's sandbox does not start.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def stub(server):
    server[0].reset()
    yield server[0]
    server[0].released.set()


class Chat:
    """The open page, and what a user does with it."""

    def __init__(self, page):
        self.page = page
        self.box = page.get_by_role("textbox", name="Message", exact=True)
        self.articles = page.locator("article")
        self.answer = page.locator("article.assistant .content").last
        self.note = page.locator("article.assistant .note").last
        self.error = page.locator("article .error").last

    def button(self, name):
        return self.page.get_by_role("button", name=name).last

    def send(self, text):
        self.box.fill(text)
        self.button("Send").click()

    def ask(self, text):
        """Sends a message, and returns when its answer is complete."""
        self.send(text)
        self.button("Send").wait_for()

    def texts(self):
        return self.page.locator("article .content").all_inner_texts()


@pytest.fixture
def open_chat(browser, server, stub):
    """A function that opens the page in a new profile. Afterwards it checks what the page asked for and logged."""
    contexts, foreign, logged = [], [], []

    def open_page(**options):
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: foreign.append(request.url) if server[1] not in request.url else None)
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.goto(server[1])
        return Chat(page)

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []
    # Chromium itself logs the failed requests that some tests are about.
    assert [text for text in logged if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def chat(open_chat):
    return open_chat()


def until(page, condition):
    """Returns once a JavaScript expression is true; the page's policy forbids Playwright's own way to wait for that."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def test_two_turns_stream_in_order(chat, stub):
    stub.replies = [["Hello", WAIT, " there"], ["Fine"]]
    chat.send("Hi")
    until(chat.page, "document.querySelector('.assistant .content').innerText === 'Hello'")
    assert not chat.button("Send").is_visible()
    chat.page.wait_for_timeout(50)  # a speed is shown from 20 ms on
    stub.released.set()
    chat.button("Send").wait_for()
    assert re.fullmatch(r"42 tokens · [\d.]+ tokens/s · first token after \d+\.\d\d s", chat.note.inner_text())
    chat.ask("How are you?")
    assert chat.texts() == ["Hi", "Hello there", "How are you?", "Fine"]
    assert chat.page.locator("article h2").all_inner_texts() == ["You", "dbrx-test"] * 2
    assert chat.page.title() == "dbrx-test"
    turns = [("user", "Hi"), ("assistant", "Hello there"), ("user", "How are you?")]
    assert stub.bodies[1] == {
        "model": "dbrx-test",
        "messages": [{"role": role, "content": content} for role, content in turns],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_speed_is_that_of_the_tokens_after_the_first_text(chat, stub):
    stub.replies = [["a" * 50, WAIT, "b" * 50]]
    chat.send("Hi")
    until(chat.page, "document.querySelector('.assistant .content').innerText.length === 50")
    chat.page.wait_for_timeout(500)
    stub.released.set()
    chat.button("Send").wait_for()
    assert 2 < float(re.search(r"([\d.]+) tokens/s", chat.note.inner_text())[1]) <= 42  # 21 tokens in half a second


def test_events_in_other_spellings_and_in_pieces(chat, stub):
    event = 'data:{"choices": [{"delta": {"content": "naïve 🙂"}}]}\r\n\r\n: a comment\r\n\r\n'.encode()
    stub.replies = [[event[i : i + 1] for i in range(len(event))]]
    chat.ask("Hi")
    assert chat.texts() == ["Hi", "naïve 🙂"]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_what_has_come(chat, stub, way):
    stub.replies = [["Once upon", WAIT, " a time"]]
    chat.send("A story")
    until(chat.page, "document.querySelector('.assistant .content').innerText === 'Once upon'")
    if way == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    chat.button("Send").wait_for()
    assert stub.gone.wait(5)
    assert chat.texts() == ["A story", "Once upon"]
    assert chat.note.inner_text() == "Stopped"
    chat.ask("Go on")
    assert [turn["content"] for turn in stub.bodies[1]["messages"]] == ["A story", "Once upon", "Go on"]


def test_settings_are_sent_and_remembered_by_this_tab(chat, stub):
    chat.ask("before")
    chat.button("Settings").click()
    values = {"System prompt": "Be brief.", "Temperature": "0.35", "Top p": "0.9", "Max tokens": "64", "Seed": "7"}
    for name, value in {**values, "API key": "secret"}.items():
        chat.page.get_by_label(name).fill(value)
    chat.button("Done").click()
    chat.page.reload()
    assert chat.texts() == ["before", "ok"]
    chat.ask("after")
    body = stub.bodies[1]
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.35,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 7,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [stub.keys[0], stub.keys[-1]] == ["", "Bearer secret"]
    assert chat.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_settings_that_make_no_sense_are_not_sent(chat, stub):
    chat.button("Settings").click()
    chat.page.get_by_label("Top p").fill("1.5")
    chat.page.keyboard.press("Escape")
    chat.send("Hi")
    assert chat.page.evaluate("document.activeElement.id") == "top_p"
    assert stub.bodies == []
    assert chat.box.input_value() == "Hi"


def test_a_key_is_asked_for_and_the_message_sent_again(open_chat, stub):
    stub.key = "right"
    chat = open_chat()
    field = chat.page.get_by_label("API key")
    field.wait_for()
    assert chat.page.evaluate("document.activeElement.id") == "key"
    chat.page.keyboard.press("Escape")
    chat.ask("Hi")
    field.wait_for()
    assert chat.error.inner_text() == "The server wants an API key: give an API key"
    field.fill("wrong")
    chat.page.keyboard.press("Enter")
    until(chat.page, "document.activeElement.id === 'key'")
    field.fill("right")
    chat.page.keyboard.press("Enter")
    until(chat.page, "document.querySelector('.assistant .content').innerText === 'ok'")
    assert chat.texts() == ["Hi", "ok"]
    assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        ((429, "16 requests wait", [(b"retry-after", b"2")]), "busy: 16 requests wait; try again in 2 s", ""),
        ((503, "the server is stopping"), "The server is not available: the server is stopping", ""),
        ((400, "seed: too large"), "The server refused this: seed: too large", ""),
        ((500, "no idea"), "The server failed: no idea", ""),
        (["Half", WAIT, {"error": {"message": "out of blocks"}}], "The server failed: out of blocks", "Half"),
        (["Half", WAIT, CUT], "The connection was lost before the answer was complete.", "Half"),
        (["Half", WAIT, END], "The connection was closed before the answer was complete.", "Half"),
    ],
    ids=["429", "503", "400", "500", "event", "cut", "end"],
)
def test_errors_are_shown_and_the_message_can_be_sent_again(chat, stub, reply, error, text):
    stub.replies = [reply]
    chat.send("Hi")
    until(chat.page, f"document.querySelector('.assistant .content').innerText === '{text}'")
    stub.released.set()
    chat.button("Send").wait_for()
    assert error in chat.error.inner_text()
    assert chat.error.get_attribute("role") == "alert"
    assert chat.texts() == ["Hi", text]
    chat.button("Try again").click()
    until(chat.page, "document.querySelector('.assistant .content').innerText === 'ok'")
    assert not chat.error.is_visible()
    assert [turn["content"] for turn in stub.bodies[1]["messages"]] == ["Hi"]


def test_a_server_that_is_gone(chat, stub):
    chat.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    chat.ask("one")
    assert chat.error.inner_text().startswith("The server cannot be reached.")
    chat.page.unroute("**/v1/chat/completions")
    chat.ask("two")  # templates want the roles in turn
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_nothing_becomes_html(chat, stub):
    stub.replies = [[f"{NASTY} **{NASTY}** `{NASTY}`\n", f"- {NASTY}\n```{NASTY}\n{NASTY}\n```"], (400, NASTY)]
    chat.ask(NASTY)
    chat.ask("again")
    assert chat.page.evaluate("window.hit") is None
    assert chat.page.locator("main").locator("img, script, b").count() == 0
    assert chat.texts()[0] == NASTY
    assert chat.texts()[1].count(NASTY) == 6
    assert NASTY in chat.error.inner_text()


MARKDOWN = [
    ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
    ("## T\nx", "<h3>T</h3><p>x</p>"),
    ("a **b `c`** `` d`e `` **", "<p>a <strong>b <code>c</code></strong> <code>d`e</code> **</p>"),
    ("2 ** 3 ** 4 and `open", "<p>2 ** 3 ** 4 and `open</p>"),
    ("- a\n- b\n  c\n\n\n- d", "<ul><li>a</li><li>b\nc</li><li>d</li></ul>"),
    ("3. a\n   - b\n     * c\n4. d", '<ol start="3"><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>'),
    ("- a\n1. b\n\nc", '<ul><li>a</li></ul><ol start="1"><li>b</li></ol><p>c</p>'),
    ("*a* #b <i>", "<p>*a* #b &lt;i&gt;</p>"),
]


@pytest.mark.parametrize(("text", "html"), MARKDOWN)
def test_markdown(chat, text, html):
    """Text that grows letter by letter ends as text that comes whole."""
    once, grown = chat.page.evaluate(
        """(text) => [[text], [...text].map((_, i) => text.slice(0, i + 1))].map((texts) => {
            const element = make("div");
            for (const part of texts) showMarkdown(element, part);
            return element.innerHTML;
        })""",
        text,
    )
    assert once == grown == html


def test_code_blocks(chat, stub):
    stub.replies = [["So:\n```pyth", "on\ndef f():\n", WAIT, "    return 1\n```\nDone"]]
    chat.send("code")
    chat.page.locator("figure", has_text="def f").wait_for()
    chat.page.evaluate("document.querySelector('figure').mark = 1")
    stub.released.set()
    chat.button("Send").wait_for()
    assert chat.page.locator("pre").inner_text() == "def f():\n    return 1"
    assert chat.page.locator("figcaption").inner_text().startswith("python")
    assert chat.page.evaluate("document.querySelector('figure').mark") == 1  # what a user has selected in it stays


def test_code_in_a_list_item_loses_its_indent(chat, stub):
    stub.replies = [["1. Install:\r\n   ```sh\r\n   if a; then\r\n     b\r\n   ```\r\n2. Run"]]
    chat.ask("how")
    assert chat.page.locator("pre").inner_text() == "if a; then\n  b"
    assert chat.page.locator("ol").evaluate_all("lists => lists.map((list) => list.start)") == [1, 2]


def test_long_and_strange_answers_are_quick(chat):
    milliseconds = chat.page.evaluate(
        """() => {
            const begin = performance.now();
            for (const text of ["` ``", "**a", "*", "a`", "    ", "1. ", "  - x\\n    ", "```\\n", "#"])
                showMarkdown(make("div"), "x" + text.repeat(20000 / text.length));
            return performance.now() - begin;
        }"""
    )
    assert milliseconds < 5000


def test_by_keyboard_alone(chat, stub):
    page, press = chat.page, chat.page.keyboard.press
    focused = lambda: page.evaluate("document.activeElement.innerText || document.activeElement.id")  # noqa: E731
    assert focused() == "box"
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    press("Enter")
    chat.button("Regenerate").wait_for()
    assert stub.bodies[0]["messages"][0]["content"] == "one\ntwo"
    assert focused() == "box"
    order = []
    for _ in range(6):
        press("Shift+Tab")
        order.append(focused())
    assert order == ["Regenerate", "Copy", "Edit", "Copy", "Settings", "New chat"]
    press("Shift+Tab")
    assert focused() == "Skip to the message"
    press("Enter")
    assert focused() == "box"
    for _ in range(3):
        press("Shift+Tab")
    press("Enter")  # Edit
    press("Escape")
    assert focused() == "Edit"
    press("Enter")
    press("End")
    page.keyboard.type("!")
    press("Enter")
    until(page, "document.querySelectorAll('.assistant .content')[0]?.innerText === 'ok'")
    assert [len(body["messages"]) for body in stub.bodies] == [1, 1]
    assert stub.bodies[1]["messages"][0]["content"] == "one\ntwo!"
    for _ in range(5):
        press("Shift+Tab")
    press("Enter")  # Settings
    assert focused() == "system"
    press("Escape")
    assert focused() == "Settings"


def test_edit_and_regenerate_replace_what_came_after(chat, stub):
    for text in ("one", "two", "three"):
        stub.replies.append([f"answer {text}"])
        chat.ask(text)
    stub.replies = [["new answer"], ["newest answer"]]
    chat.button("Regenerate").click()
    until(chat.page, "document.querySelector('article:last-child .content').innerText === 'new answer'")
    assert chat.texts() == ["one", "answer one", "two", "answer two", "three", "new answer"]
    chat.page.get_by_role("button", name="Edit").nth(1).click()
    chat.page.get_by_label("Edit your message").fill("TWO")
    chat.button("Resend").click()
    until(chat.page, "document.querySelector('article:last-child .content').innerText === 'newest answer'")
    assert chat.texts() == ["one", "answer one", "TWO", "newest answer"]
    assert [turn["content"] for turn in stub.bodies[-1]["messages"]] == ["one", "answer one", "TWO"]


def test_new_conversation_ends_the_answer(chat, stub):
    stub.replies = [["Half", WAIT]]
    chat.send("Hi")
    until(chat.page, "document.querySelector('.assistant .content').innerText === 'Half'")
    chat.page.on("dialog", lambda dialog: dialog.accept())
    chat.button("New chat").click()
    assert stub.gone.wait(5)
    assert chat.texts() == []
    assert chat.page.evaluate("$('announcer').textContent") == "New chat"
    chat.page.reload()
    assert chat.texts() == []
    chat.ask("Other")
    assert chat.texts() == ["Other", "ok"]
    assert stub.bodies[1]["messages"] == [{"role": "user", "content": "Other"}]


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_copy(open_chat, stub, has_clipboard):
    chat = open_chat(permissions=["clipboard-read", "clipboard-write"])
    if not has_clipboard:  # as on a page that came by http from another machine
        chat.page.evaluate("Object.defineProperty(navigator, 'kept', {value: navigator.clipboard})")
        chat.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    stub.replies = [["Some **text**\n```\ncode\n```"]]
    chat.ask("Hi")
    clipboard = "(navigator.clipboard ?? navigator.kept).readText()"
    for name, text in {"Copy the answer": "Some **text**\n```\ncode\n```", "Copy the code": "code"}.items():
        chat.button(name).click()
        chat.button(name).get_by_text("Copied").wait_for()
        assert chat.page.evaluate(clipboard) == text
        assert chat.page.evaluate("document.activeElement.ariaLabel") == name


def test_live_region_speaks_seldom_and_tells_all(chat, stub):
    words = [f"word{i}{'.' if i % 5 == 4 else ''} " for i in range(400)]
    stub.replies = [words]
    chat.page.evaluate(
        """() => {
            window.spoken = [];
            const region = $("announcer");
            new MutationObserver(() => spoken.push(region.textContent)).observe(region, {childList: true});
        }"""
    )
    chat.ask("Hi")
    first, *rest = chat.page.evaluate("spoken")
    assert first == "Waiting for the answer"
    assert "".join(rest) == "".join(words)
    assert all(text.endswith(". ") for text in rest)
    assert len(rest) <= 3  # in the second or so that 400 pieces take


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_chat, stub, scheme):
    from axe_playwright_python.sync_playwright import Axe

    chat = open_chat(color_scheme=scheme, reduced_motion="reduce", viewport={"width": 320, "height": 640})
    stub.replies = [
        ["## Title\nSome `code` and **bold**\n- a\n\n```python\nx = 1\n```"],
        (503, "the server is stopping"),
    ]
    results = [Axe().run(chat.page)]
    chat.ask("Hi")
    chat.ask("again")
    results.append(Axe().run(chat.page))
    chat.button("Settings").click()
    results.append(Axe().run(chat.page))
    for result in results:
        assert result.response["violations"] == [], result.generate_report()


def test_a_phone_needs_no_sideways_scrolling(open_chat, stub):
    chat = open_chat(viewport={"width": 320, "height": 568}, has_touch=True)
    long = "a" * 100
    stub.replies = [[f"{long} `{long}`\n1. {long}\n## {long}\n```{long}\n{long}\n```"], (400, long)]
    widths = "[document.documentElement.scrollWidth, document.body.scrollWidth, $('settings').scrollWidth]"
    chat.ask(long)
    chat.ask("again")
    assert max(chat.page.evaluate(widths)) <= 320
    chat.page.locator("pre").press("ArrowRight")  # what is wider scrolls by itself, also by keys
    until(chat.page, "document.querySelector('pre').scrollLeft > 20")
    chat.button("Edit").click()
    assert max(chat.page.evaluate(widths)) <= 320
    chat.button("Settings").click()
    assert max(chat.page.evaluate(widths)) <= 320
    box = chat.button("Done").bounding_box()
    assert 0 <= box["x"] <= 320 - box["width"]


def test_enter_starts_a_line_on_a_phone(open_chat, stub):
    chat = open_chat(viewport={"width": 320, "height": 568}, has_touch=True, is_mobile=True)
    chat.box.fill("one")
    chat.box.press("Enter")
    assert chat.box.input_value() == "one\n"
    assert stub.bodies == []
    assert not chat.page.locator("#hint").is_visible()


def test_the_page_follows_an_answer_unless_its_reader_scrolls_away(chat, stub):
    lines = [f"line {i}\n\n" for i in range(60)]
    stub.replies = [[*lines, WAIT, *lines]]
    chat.send("Hi")
    chat.page.get_by_text("line 59").wait_for()
    gap = "document.scrollingElement.scrollHeight - scrollY - innerHeight"
    until(chat.page, f"{gap} < 5")
    chat.page.mouse.wheel(0, -600)
    until(chat.page, f"{gap} > 400")
    place = chat.page.evaluate("scrollY")
    stub.released.set()
    chat.button("Send").wait_for()
    assert chat.page.evaluate("scrollY") == pytest.approx(place, abs=1)


def test_motion_can_be_switched_off(open_chat, stub):
    stub.replies = [[WAIT]] * 2
    names = []
    for motion in ("no-preference", "reduce"):
        chat = open_chat(reduced_motion=motion)
        chat.send("Hi")
        chat.page.locator(".waiting").wait_for()
        names.append(
            chat.page.evaluate("getComputedStyle(document.querySelector('.waiting'), '::after').animationName")
        )
    assert names == ["pulse", "none"]
