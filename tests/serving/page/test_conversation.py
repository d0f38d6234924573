"""Tests of conversations on the chat page: streaming, stopping, settings, errors, other versions of a message."""

import re

import pytest

from tests.serving.page.chat import until
from tests.serving.page.stub import CUT, END, WAIT

pytestmark = pytest.mark.slow


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
