"""Tests of how the chat page shows what a model writes."""

import pytest

from tests.serving.page.stub import WAIT

pytestmark = pytest.mark.slow
NASTY = '<img src=x onerror="window.hit=1"><script>window.hit=1</script></p><b>&amp;'


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
