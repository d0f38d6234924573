"""Tests of the chat page by keyboard, with screen readers, on phones and by people who want no motion."""

import pytest

from tests.serving.page.chat import until
from tests.serving.page.stub import WAIT

pytestmark = pytest.mark.slow


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
