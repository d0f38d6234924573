"""The examples of README.md and docs/serving.md are answered as they are printed, but for the server's port."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the engine compiles for a minute
ROOT = Path(__file__).parents[3]
README, SERVING = (ROOT / name for name in ("README.md", "docs/serving.md"))


@pytest.fixture(scope="module")
def url(client):
    return str(client.base_url).removesuffix("/v1/")


def blocks(page, language):
    """The page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on the path")
def test_curl(url):
    commands = [block for page in (README, SERVING) for block in blocks(page, "(?:ba)?sh") if block.startswith("curl")]
    assert len(commands) == 2
    printed = []
    for command in commands:
        local = command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(["bash", "-euc", local], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done
        printed.append(done.stdout)
    assert json.loads(printed[0])["choices"][0]["text"]
    whole, *events = printed[1].split("data: ")
    assert json.loads(whole)["choices"][0]["text"].startswith(" a")
    end, models = events.pop().splitlines()[0::2]
    assert end == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
    assert json.loads(models)["data"][0]["id"] == "dbrx-demo"


def test_openai(url):
    example = next(block for block in blocks(SERVING, "python") if "OpenAI" in block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.replace("http://127.0.0.1:8000", url), {})
    assert printed.getvalue()
