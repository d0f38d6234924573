"""Tools: functions that a conversation offers, and the calls of them in the model's text.

Their form is the one that most templates teach: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
"""

import json
import re
import uuid
from typing import Any

from dbrx_jax.serving.errors import bad_request
from dbrx_jax.serving.protocol import ChatBody, NamedTool
from dbrx_jax.text.tokenizer import DbrxTokenizer

BEGIN, END = "<tool_call>", "</tool_call>"


def tools_of(body: ChatBody, tokenizer: DbrxTokenizer) -> list[dict[str, Any]] | None:
    """Returns the tools of a request for the chat template, or None.

    Raises:
      ApiError: the checkpoint's template has no tools, a tool is not a function with a name, or the tool that must be
        called is not there.
    """
    tools = None if body.tool_choice == "none" else body.tools or None
    has_calls = any(
        message.role == "tool" or (message.model_extra or {}).get("tool_calls") for message in body.messages
    )
    if tools or has_calls:
        template = tokenizer.get_chat_template(tools=tools)
        if not re.search(r"\btools\b", template) or BEGIN not in template:
            field = "tools" if tools else "messages"
            raise bad_request(f"{field}: this model's chat template has no tools with {BEGIN}", field)
    if is_forced(body) and not tools:
        raise bad_request("tool_choice: there are no tools", "tool_choice")
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise bad_request(f"tools[{number}]: expected a function with a name", "tools")
        if not isinstance(function.get("parameters") or {}, dict):
            raise bad_request(f"tools[{number}].function.parameters: expected a JSON schema", "tools")
    if is_forced(body) and not _candidates(body):
        raise bad_request("tool_choice: there is no tool with this name", "tool_choice")
    return tools


def is_forced(body: ChatBody) -> bool:
    """Returns whether the answer must be a call."""
    return body.tool_choice not in (None, "none", "auto")


def _candidates(body: ChatBody) -> list[dict[str, Any]]:
    """Returns the functions of which one must be called."""
    functions = [tool["function"] for tool in body.tools or ()]
    if not isinstance(body.tool_choice, NamedTool):
        return functions
    return [function for function in functions if function["name"] == body.tool_choice.function.get("name")]


def forced_call(body: ChatBody) -> dict[str, Any] | None:
    """Returns the JSON schema of the call that must be the answer, or None if it may be something else."""
    if not is_forced(body):
        return None
    # With an $id the references inside a function's parameters are relative to these.
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": {"type": "object", **(function.get("parameters") or {}), "$id": f"tool:{number}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, function in enumerate(_candidates(body))
    ]
    return {"anyOf": calls}


class ToolParser:
    """Finds the calls in a text that comes in pieces.

    Text that may begin a call is kept back; a call that is not valid JSON stays text.

    Attributes:
      num_calls: calls until now.
    """

    def __init__(self) -> None:
        self._text, self.num_calls, self._is_behind_call = "", 0, False

    def push(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text outside of calls, and the calls that are complete, as the API has them."""
        self._text += text
        outside = ""
        calls: list[dict[str, Any]] = []
        while (begin := self._text.find(BEGIN)) >= 0 and (end := self._text.find(END, begin)) >= 0:
            outside += self._take(begin)
            whole = self._take(end - begin + len(END))
            if (call := _read_call(whole.removeprefix(BEGIN).removesuffix(END), self.num_calls)) is None:
                outside += whole
            else:
                calls.append(call)
                self.num_calls += 1
                self._is_behind_call = True
        if is_last:
            begin = len(self._text)
        elif begin < 0:
            begin = len(self._text) - _partial_tag(self._text)
        return outside + self._take(begin), calls

    def _take(self, length: int) -> str:
        """Removes and returns the beginning of the text, without the ends of lines behind a call."""
        text, self._text = self._text[:length], self._text[length:]
        if self._is_behind_call:
            text = text.lstrip("\n")
            self._is_behind_call = not text
        return text


class CallParser:
    """Reads a text that comes in pieces and is one call, without its tags; a call that was cut off stays text.

    Attributes:
      num_calls: calls until now.
    """

    def __init__(self) -> None:
        self._text, self.num_calls = "", 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text if it is no call, and the call, as the API has it; both when the text is complete."""
        self._text += text
        call = _read_call(self._text, 0) if is_last else None
        if call is None:
            return (self._text if is_last else ""), []
        self.num_calls = 1
        return "", [call]


def _read_call(text: str, index: int) -> dict[str, Any] | None:
    """Returns the call of a text as the API has it, or None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": value["name"], "arguments": arguments},
    }


def _partial_tag(text: str) -> int:
    """Returns the length of the longest suffix that may begin a call."""
    return max((n for n in range(1, len(BEGIN)) if text.endswith(BEGIN[:n])), default=0)
