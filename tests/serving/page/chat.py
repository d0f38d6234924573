"""The chat page in a browser, and what a user does with it."""

import time


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


def until(page, condition):
    """Returns once a JavaScript expression is true; the page's policy forbids Playwright's own way to wait for that."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)
