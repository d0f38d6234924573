"""Compiles chat templates: Jinja's sandbox, the names that published templates use, and tracked text."""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.filters import do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_eval_context
from jinja2.visitor import NodeTransformer

from .tracked_str import TrackedStr, concat, formatted, generated, trusted


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Returns a template whose own text renders as trusted; raises jinja2.TemplateSyntaxError.

    Each has an environment of its own, which holds its texts.
    """
    environment = _ChatEnvironment()
    tree = _TrustLiterals(environment).visit(environment.parse(source))
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _GenerationTag(Extension):
    """`{% generation %}`, by which templates mark the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body, lineno=line)

    def mark(self, caller: Callable[[], str]) -> str:
        return generated(caller())


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """The settings and names that published templates are written for, and text that keeps its flags."""

    concat = staticmethod(concat)

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.filters |= {"tojson": _to_json, "join": _join, "indent": _indent}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    @staticmethod
    def concat_values(values: Iterable[Any]) -> str:
        """The operator ~."""
        return concat(map(str, values))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the sandbox's `str.format`, which keeps the flags of formats with {} alone."""
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None or value.__name__ != "format" or type(value.__self__) is not TrackedStr:
            return sandboxed

        def format_tracked(*args: Any, **kwargs: Any) -> str:
            return formatted(value.__self__, "{}", args, sandboxed(*args, **kwargs))

        return format_tracked


class _TrustLiterals(NodeTransformer):
    """Makes a template's own text trusted: strings in expressions, and what stands between the tags.

    The compiler would write such text into its program, where it would be plain. Here it becomes an attribute of the
    environment.
    """

    def __init__(self, environment: _ChatEnvironment):
        self._environment = environment
        self._count = 0

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        return self._literal(node.value, node.lineno) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return self._literal(node.data, node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        values = [self.visit(value) for value in node.nodes]
        join = nodes.EnvironmentAttribute("concat_values")
        return nodes.Call(join, [nodes.List(values)], [], None, None, lineno=node.lineno)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        return node  # autoescape escapes variables and not literals, so there they stay as they are, untrusted

    def _literal(self, text: str, line: int) -> nodes.Expr:
        name = f"literal_{self._count}"
        self._count += 1
        setattr(self._environment, name, trusted(text))
        return nodes.EnvironmentAttribute(name, lineno=line)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson as transformers has it: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's filter join, with a separator that keeps flags."""
    return do_join(context, value, d if context.autoescape else concat([str(d)]), attribute)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter indent, of tracked text."""
    indention = width if isinstance(width, str) else " " * width
    lines = (concat([s]) + "\n").splitlines()
    indented = [line if number == 0 or not (line or blank) else indention + line for number, line in enumerate(lines)]
    return (indention if first else "") + concat(["\n"]).join(indented)
