"""The chat page in Chromium. A test gets `stub`, the server, and `chat` or `open_chat`, the page."""

import shutil
import socket
import threading

import pytest

from tests.serving.page.chat import Chat
from tests.serving.page.stub import Stub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
