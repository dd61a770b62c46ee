"""The Jinja environment of chat templates: nothing of Python within reach, every step paid for, origins kept.

A template is parsed, and its tree rewritten before it is compiled: loops, literals, concatenations and outputs go
through the filters below, whose names no template can write. Calls and operators go through the sandbox's own hooks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from springtide.text.template_budget import Budget, check_power, check_product
from springtide.text.template_text import TemplateText, format_braces, format_percent, join_texts

BUDGET, NOW = "(budget)", "(now)"
_EACH, _LITERAL, _MADE, _JOINED, _OUTPUT = "(each)", "(literal)", "(made)", "(joined)", "(output)"
_MAX_INDENT = 64
_MAX_SEPARATOR = 16
_NAIVE_CHARACTERS_PER_BYTE = 8  # as long as making a byte takes, so many characters are compared


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters and methods that make much out of little (center, batch, ljust, zfill ...), or that reach further than
# the value, are left out. Those that need a look beforehand are written below.
_JINJA_FILTERS = _words(
    "abs capitalize count d default dictsort first float groupby int items last length list lower map max min "
    "reject rejectattr reverse select selectattr sort title unique upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower "
        "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind "
        "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
    int: _words("is_integer"),
    float: _words("is_integer"),
}


class RaisedByTemplate(Exception):
    """The template called `raise_exception`: it refuses these messages."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates. Their context must hold a `Budget` under the name `BUDGET`, and the time of the request
    (unix seconds) under `NOW`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(join_texts)

    def __init__(self) -> None:
        # Not optimized: constants are not worked out at compile time, where nothing would be paid for.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters = {name: _paid(self.filters[name]) for name in _JINJA_FILTERS} | _FILTERS

    def from_source(self, source: str) -> jinja2.Template:
        """The compiled template.

        Raises:
            jinja2.TemplateError: a syntax error, or a filter that there is not.
        """
        tree = _Rewrite().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.spend()
        owner = getattr(function, "__self__", None)
        guarded = _GUARDED_METHODS.get(getattr(function, "__name__", "")) if isinstance(owner, str) else None
        if guarded is not None:
            function = partial(guarded, budget, owner)
        return budget.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            budget.check_size(right)
            return budget.made(format_percent(left, right))
        if operator == "**":
            check_power(left, right)
        if operator == "*":
            check_product(left, right)
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    budget.repeated(value, times)
        return budget.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for type, names in _METHODS.items():
            if isinstance(obj, type):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is none of the sandbox's business here: `call` does it in our own way."""


class _Rewrite(NodeTransformer):
    """Puts our filters around all that repeats, makes text, or makes containers."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_EACH, node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through(_OUTPUT, child) for child in node.nodes]
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return _through(_LITERAL, nodes.Const(node.data, lineno=node.lineno))

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        return _through(_LITERAL, node) if isinstance(node.value, str) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        # Literals that are only compared become no text.
        node.expr = self._visit_unless_const(node.expr)
        for operand in node.ops:
            operand.expr = self._visit_unless_const(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        node.arg = self._visit_unless_const(node.arg)
        return _through(_MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return _through(_MADE, self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return _through(_MADE, self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _through(_MADE, node) if node.ctx == "load" else node

    def _visit_unless_const(self, node: nodes.Expr) -> Any:
        return node if isinstance(node, nodes.Const) else self.visit(node)


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; here its body is simply part of the text."""

    tags = {"generation"}  # noqa: RUF012 - as in Extension

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


def _raise_exception(message: str) -> NoReturn:
    raise RaisedByTemplate(str(message)[:1000])


@pass_context
def _strftime_now(context: Context, format: str) -> str:
    """The time of the request, in UTC: the same on every node, and again when a request is done over."""
    if len(format) > 100 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise ValueError("strftime_now takes short formats without widths")
    return datetime.fromtimestamp(context.parent[NOW], UTC).strftime(format)


# -- our filters ---------------------------------------------------------------------------------------------


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    return _budget(context).each(values)


@pass_context  # so that it is never worked out at compile time, which would forget the spans
def _literal(context: Context, text: str) -> str:
    return TemplateText.whole(text)


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget(context).made(value)


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    return _join(_budget(context), "", values)


@pass_context
def _output(context: Context, value: Any) -> str:
    budget = _budget(context)
    text = _text(budget, value)
    budget.spend(sys.getsizeof(text))
    return text


@pass_context
def _join_filter(context: Context, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    budget = _budget(context)
    if attribute is not None:
        values = context.environment.call_filter("map", values, kwargs={"attribute": attribute}, context=context)
    return _join(budget, _text(budget, d), list(budget.each(values)))


@pass_context
def _replace_filter(context: Context, value: Any, old: str, new: str, count: int | None = None) -> str:
    budget = _budget(context)
    result: str = budget.made(_replace(budget, _text(budget, value), old, new, -1 if count is None else count))
    return result


@pass_context
def _tojson(
    context: Context,
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models are trained on it: not escaped for HTML, and text as it is."""
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise ValueError(f"tojson takes an indent of up to {_MAX_INDENT}")
    if separators is not None and max(map(len, separators)) > _MAX_SEPARATOR:
        raise ValueError(f"tojson takes separators of up to {_MAX_SEPARATOR} characters")
    budget = _budget(context)
    budget.check_size(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):  # in pieces, since indents multiply
        budget.spend(sys.getsizeof(piece))
        pieces.append(piece)
    return "".join(pieces)


@pass_context
def _indent(context: Context, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    indention = width if isinstance(width, str) else " " * width if 0 <= width <= _MAX_INDENT else None
    if indention is None:
        raise ValueError(f"indent takes a width of up to {_MAX_INDENT}")
    budget = _budget(context)
    lines = (_text(budget, value) + "\n").splitlines()  # so that a newline at the end begins a line, as in Jinja
    budget.repeated(indention, len(lines))
    indented = [indention + line if line or blank else line for line in lines]
    if not first:
        indented[0] = lines[0]
    return _join(budget, "\n", indented)


@pass_context
def _format_filter(context: Context, value: Any, *args: Any) -> str:
    budget = _budget(context)
    budget.check_size(args)
    result: str = budget.made(format_percent(_text(budget, value), args))
    return result


@pass_context
def _string(context: Context, value: Any) -> str:
    return _text(_budget(context), value)


@pass_context
def _trim(context: Context, value: Any, chars: str | None = None) -> str:
    budget = _budget(context)
    result: str = budget.made(_GUARDED_METHODS["strip"](budget, _text(budget, value), chars))
    return result


@pass_context
def _safe(context: Context, value: Any) -> Any:
    return value


@pass_context
def _escape(context: Context, value: Any) -> str:
    budget = _budget(context)
    result: str = budget.made(str.__str__(escape(_text(budget, value))))
    return result


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters, whose result is paid for."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def call(context: Context, *args: Any, **kwargs: Any) -> Any:
        first = {"context": context, "environment": context.environment, "eval_context": context.eval_ctx}
        result = function(first[wanted], *args, **kwargs) if wanted else function(*args, **kwargs)
        return _budget(context).made(result)

    return call


# -- what makes much out of little ---------------------------------------------------------------------------


def _text(budget: Budget, value: Any) -> str:
    if isinstance(value, str):
        return value
    budget.check_size(value)
    return str(value)


def _join(budget: Budget, separator: str, values: list[Any]) -> str:
    texts = [_text(budget, value) for value in values]
    budget.spend(sum(map(sys.getsizeof, texts)) + sys.getsizeof(separator) * len(texts))
    return join_texts(texts, separator)


def _replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    budget.repeated(new, text.count(old) if count < 0 else min(count, text.count(old)))
    return text.replace(old, new, count)


def _format(budget: Budget, text: str, *args: Any, **kwargs: Any) -> str:
    budget.repeated([*args, *kwargs.values()], text.count("{"))
    return format_braces(text, args, kwargs)


def _naive(name: str) -> Callable[..., Any]:
    """A method for which Python may hold each character of one text against each of another."""

    def call(budget: Budget, text: str, *args: Any, **kwargs: Any) -> Any:
        other = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), "")
        budget.spend(len(text) * len(other) // _NAIVE_CHARACTERS_PER_BYTE)
        return getattr(text, name)(*args, **kwargs)

    return call


_NAIVE_METHODS = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")
_GUARDED_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _naive(name) for name in _NAIVE_METHODS},
    "join": lambda budget, text, values: _join(budget, text, list(budget.each(values))),
    "replace": _replace,
    "format": _format,
}
_FILTERS: dict[str, Callable[..., Any]] = {
    _EACH: _each,
    _LITERAL: _literal,
    _MADE: _made,
    _JOINED: _joined,
    _OUTPUT: _output,
    "e": _escape,
    "escape": _escape,
    "format": _format_filter,
    "indent": _indent,
    "join": _join_filter,
    "replace": _replace_filter,
    "safe": _safe,
    "string": _string,
    "tojson": _tojson,
    "trim": _trim,
}
