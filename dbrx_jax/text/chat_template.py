"""Renders a checkpoint's chat template, an untrusted program.

It runs in Jinja's sandbox, in a process with limited memory and time, because a sandboxed template can still
repeat a string until memory is full. Run as a script, this file is that process; it imports nothing of the package.
"""

import json
import subprocess
import sys
from typing import Any

MAX_TEMPLATE = 1 << 18  # characters
MAX_TEXT = 16 << 20  # characters; a million tokens are some four million
MEMORY = 1 << 30  # bytes
SECONDS = 10

# ChatML, for checkpoints that bring no template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


class TemplateFailure(Exception):
    """Raised if a template is invalid, refuses its input, or exceeds a limit; the message says which."""


def render(template: str, variables: dict[str, Any]) -> str:
    """Returns the template's text for these variables (JSON values); raises TemplateFailure."""
    if len(template) > MAX_TEMPLATE:
        raise TemplateFailure(f"it is longer than {MAX_TEMPLATE} characters")
    job = json.dumps({"template": template, "variables": variables, "path": sys.path})
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__], input=job, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TemplateFailure(f"it ran for more than {SECONDS} seconds") from None
    try:
        result = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        raise TemplateFailure(
            f"its process, held to {MEMORY >> 20} MiB and {SECONDS} seconds, failed: {last}"
        ) from None
    if "error" in result:
        raise TemplateFailure(result["error"])
    return result["text"]


def _serve() -> None:
    import resource

    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    # The settings and names that published templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.globals["raise_exception"] = raise_exception
    try:
        text = environment.from_string(job["template"]).render(job["variables"])
        result = {"text": text} if len(text) <= MAX_TEXT else {"error": f"its text is over {MAX_TEXT} characters"}
    except MemoryError:
        result = {"error": f"it needed more than {MEMORY >> 20} MiB"}
    except Exception as error:  # the template may raise anything
        result = {"error": " ".join(f"{error}".split()) or type(error).__name__}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    _serve()
