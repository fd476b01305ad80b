"""Chat templates: conversations to text, as transformers renders them, at a bounded cost.

The language is jinja2's with `trim_blocks` and `lstrip_blocks`, the tags `break`, `continue` and
`generation`, the functions `raise_exception`, `strftime_now`, `namespace`, `range` and `dict`, and a
`tojson` that escapes nothing. A template is a program from a stranger: it reaches no Python, and its
source, steps, memory, output and time are bounded (`budget`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser

from kbit.text.budget import MAX_NESTING, MAX_SECONDS, Budget, kind_of
from kbit.text.evaluate import Evaluator
from kbit.text.filters import FILTERS, TESTS
from kbit.text.kinds import MAX_SOURCE, TemplateError
from kbit.text.methods import METHODS
from kbit.text.values import Function, Namespace

MAX_LEXEMES = 20_000
"""Most words and signs in a source: each becomes a node of a few hundred bytes."""
MAX_BACKSLASHES = 20_000
"""jinja2's pattern for strings keeps a few hundred bytes for each while it matches."""
MAX_RANGE = 100_000
"""Longest `range`, as in jinja2's sandbox."""

PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The format of `chat` for a model without a template: ``User: hi``, a blank line, ``Assistant:``."""

_LONG_NUMBER = re.compile(r"[0-9a-fA-F_]{1000}")
_OPENING = frozenset(["if", "for", "macro", "call", "filter", "with", "generation"])
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote: a scope of its own, otherwise without effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounds(Extension):
    """Counts words, nesting and seconds while jinja2 parses."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:  # pyright: ignore[reportIncompatibleMethodOverride]
        end = time.thread_time() + MAX_SECONDS
        depth = 0
        opened = False
        for count, token in enumerate(stream, 1):
            if count > MAX_LEXEMES:
                raise TemplateError(f"chat template: more than {MAX_LEXEMES} words and signs")
            if count % 256 == 0 and time.thread_time() > end:
                raise TemplateError(f"chat template: parsing takes longer than {MAX_SECONDS:g} s")
            if token.type in ("lparen", "lbracket", "lbrace"):
                depth += 1
            elif token.type in ("rparen", "rbracket", "rbrace"):
                depth -= 1
            elif opened and token.type == "name":
                depth += (token.value in _OPENING) - token.value.startswith("end")
            opened = token.type == "block_begin"
            if depth > MAX_NESTING:
                raise TemplateError(
                    f"chat template: nests deeper than {MAX_NESTING}, line {token.lineno}"
                )
            yield token


def _environment() -> Environment:
    return Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Bounds, _Generation, loopcontrols]
    )


class ChatTemplate:
    """A parsed chat template.

    Args:
        source: jinja2 source, at most 1 MiB.

    Raises:
        TemplateError: It does not parse, or goes beyond the bounds.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"chat template: {len(source)} characters; at most {MAX_SOURCE} are read"
            )
        if _LONG_NUMBER.search(source) or source.count("\\") > MAX_BACKSLASHES:
            raise TemplateError(
                f"chat template: more than {MAX_BACKSLASHES} backslashes, or a number of a thousand digits"
            )
        self.source = source
        self._environment = _environment()
        try:
            self._template = Parser(self._environment, source).parse()
        except TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise TemplateError("chat template: nests too deeply to be parsed") from None
        except MemoryError:
            raise TemplateError("chat template: out of memory") from None
        except (ValueError, OverflowError, AssertionError, JinjaError) as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateError(f"chat template: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None, add_generation_prompt: bool = False,
        guard: Callable[[str], str] = str, **variables: Any,
    ) -> str:  # fmt: skip
        """The text of a conversation.

        Args:
            messages: Dicts with a `role`, usually a `content`, and whatever else the template reads.
            tools: JSON schemas of functions the model may call.
            documents: Texts the model may use.
            add_generation_prompt: End with what begins the assistant's answer.
            guard: Applied to every string in the arguments before the template sees it.
            variables: More names for the template, such as ``bos_token``.

        Raises:
            TemplateError: The template fails, refuses the conversation, or goes beyond its bounds.
            TypeError: An argument that is not JSON-like data.
        """
        budget = Budget()
        given = {
            **variables,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        kept = [_message(message) for message in messages]
        try:
            return self._run(budget, given | {"messages": [_without_nulls(m) for m in kept]}, guard)
        except TemplateError:
            if not any("content" in message and message["content"] is None for message in kept):
                raise
        # A template that asks whether the content of a call is null.
        return self._run(budget, given | {"messages": kept}, guard)

    def _run(self, budget: Budget, given: Mapping[str, Any], guard: Callable[[str], str]) -> str:
        names = {name: budget.plain(value, guard) for name, value in given.items()}
        evaluator = Evaluator(
            self._environment, FILTERS, TESTS, METHODS, {**_functions(budget), **names}, budget
        )
        try:
            return evaluator.render(self._template)
        except TemplateError as error:
            raise TemplateError(f"chat template, line {evaluator.line}: {error}") from None
        except RecursionError:
            raise TemplateError(f"chat template, line {evaluator.line}: runs too deep") from None
        except MemoryError:
            raise TemplateError(f"chat template, line {evaluator.line}: out of memory") from None
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            JinjaError,
        ) as error:
            raise TemplateError(f"chat template, line {evaluator.line}: {error}") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no key that is null, reasoning under each of its names.

    Clients send ``"tool_calls": null``, and templates ask whether the key is there. The `content` beside tool calls
    stays.
    """
    if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"a message is a dict with a role and content, not a {type(message).__name__}"
        )
    kept = {
        key: value
        for key, value in message.items()
        if value is not None or (key == "content" and message.get("tool_calls"))
    }
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return (
        kept
        if reasoning is None
        else {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    )


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _functions(budget: Budget) -> dict[str, Any]:
    """The functions every template may call."""

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message)[:1000])

    def strftime_now(form: Any) -> str:
        if not isinstance(form, str) or len(form) > 256:
            raise TemplateError("strftime_now takes a format of at most 256 characters")
        return datetime.now().strftime(form)

    def bounded_range(*bounds: Any) -> range:
        if not all(isinstance(bound, int) for bound in bounds):
            raise TemplateError(f"range takes ints, not {', '.join(map(kind_of, bounds))}")
        made = range(*bounds)
        if made and abs((made[-1] - made[0]) // made.step) >= MAX_RANGE:
            raise TemplateError(f"range of more than {MAX_RANGE}")
        return made

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        attributes: dict[Any, Any] = dict(*args, **kwargs)
        budget.take(64 + 120 * len(attributes))
        if any(not isinstance(name, str) or name.startswith("_") for name in attributes):
            raise TemplateError("a namespace takes names that do not begin with an underscore")
        return Namespace(attributes)

    def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        budget.step(1 + sum(budget.weight(arg) // 8 for arg in args))
        return budget.container(dict(*args, **kwargs))

    functions: list[Callable[..., Any]] = [raise_exception, strftime_now, namespace]
    named = {function.__name__: Function(function.__name__, function) for function in functions}
    return {**named, "range": Function("range", bounded_range), "dict": Function("dict", new_dict)}
