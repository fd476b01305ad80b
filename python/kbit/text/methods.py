"""Methods of texts, lists and dicts in chat templates, each with its cost counted before it is paid."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate

from kbit.text.budget import kind_of, text_bytes
from kbit.text.kinds import TemplateError, is_list

if TYPE_CHECKING:
    from kbit.text.evaluate import Evaluator

    Call = Callable[Concatenate[Evaluator, Any, ...], Any]

MAX_WIDTH = 1000
"""Widest field of a format, in characters."""


def width_of(value: Any, what: str) -> int:
    """`value` as a width or count that is small enough."""
    if not isinstance(value, int):
        raise TemplateError(f"{what} takes an int, not a {kind_of(value)}")
    if abs(value) > 1 << 20:
        raise TemplateError(f"{what} of {value} is beyond {1 << 20}")
    return int(value)


def as_text(ev: Evaluator, value: Any, factor: int = 1, extra: int = 0) -> str:
    """`value` as text, with `factor` times its bytes and `extra` characters taken for what is made of it."""
    text = ev.text(value)
    ev.budget.take(factor * (text_bytes(text) + 4 * extra))
    return text


# Methods of str, list, tuple and dict. A method takes the evaluator, the value and the arguments.


def string_of(value: Any, what: str) -> str:
    """`value` if it is a string."""
    if not isinstance(value, str):
        raise TemplateError(f"{what} takes strings, not a {kind_of(value)}")
    return value


def short(text: str, limit: int, what: str) -> str:
    """`text`, if what is done to it may cost more than its length."""
    if len(text) > limit:
        raise TemplateError(f"{what} of {len(text)} characters; at most {limit} are taken")
    return text


def _method(name: str, factor: int = 1) -> Call:
    """A method of str whose result is bounded by `factor` times the text."""
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, *args: Any, **kwargs: Any) -> Any:
        ev.budget.take(factor * text_bytes(value))
        if name.endswith("strip") and args and isinstance(args[0], str):
            short(args[0], 256, f"a set for {name}")
        return function(value, *args, **kwargs)

    return call


def _padded(name: str) -> Call:
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, width: Any, *fill: Any) -> str:
        ev.budget.take(text_bytes(value) + 4 * abs(width_of(width, name)))
        return function(value, width, *fill)

    return call


def _split(name: str) -> Call:
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        parts = (
            len(value) // 2 + 1
            if sep is None
            else value.count(string_of(sep, name)) + 1
            if sep
            else 1
        )
        limit = width_of(maxsplit, name)
        parts = min(parts, limit + 1) if limit >= 0 else parts
        ev.budget.take(text_bytes(value) + 64 * parts)
        return ev.budget.made(function(value, sep, limit))

    return call


def splitlines(ev: Evaluator, value: str, keepends: Any = False) -> list[str]:
    """`value.splitlines()`."""
    lines = sum(map(value.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) + 1
    ev.budget.take(text_bytes(value) + 64 * lines)
    return ev.budget.made(value.splitlines(bool(keepends)))


def _partition(name: str) -> Call:
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, sep: Any) -> Any:
        return ev.budget.container(function(as_text(ev, value), string_of(sep, name)))

    return call


def str_replace(ev: Evaluator, value: str, old: Any, new: Any, count: Any = -1) -> str:
    """`value.replace(old, new, count)`."""
    limit = -1 if count is None else width_of(count, "replace")
    found = value.count(string_of(old, "replace"))
    found = min(found, limit) if limit >= 0 else found
    wide = 1 if value.isascii() and string_of(new, "replace").isascii() else 4
    ev.budget.take(wide * (len(value) + found * max(0, len(new) - len(old))))
    return value.replace(old, new, limit)


def _join(ev: Evaluator, separator: str, items: Any) -> str:
    parts = [string_of(item, "join") for item in ev.iterate(items)]
    ev.budget.take(sum(map(text_bytes, parts)) + text_bytes(separator) * len(parts))
    return separator.join(parts)


def _expandtabs(ev: Evaluator, value: str, tabsize: Any = 8) -> str:
    ev.budget.take(text_bytes(value) + 4 * value.count("\t") * abs(width_of(tabsize, "expandtabs")))
    return value.expandtabs(tabsize)


def _format(ev: Evaluator, template: str, *args: Any, **kwargs: Any) -> str:
    """`str.format`: fields by position or name, their attributes and items as a template sees them."""
    out: list[str] = []
    automatic = 0
    for literal, name, spec, conversion in string.Formatter().parse(template):
        out.append(literal)
        if name is None:
            continue
        first, path = _field(name)
        if first == "":
            first, automatic = automatic, automatic + 1
        try:
            value = args[first] if isinstance(first, int) else kwargs[first]
        except LookupError:
            raise TemplateError(f"format has no value for the field {name!r}") from None
        for is_attribute, key in path:
            value = ev.attribute(value, str(key)) if is_attribute else ev.item(value, key)
        if conversion is not None and conversion != "s":
            raise TemplateError(f"format offers the conversion !s, not !{conversion}")
        if "{" in (spec or "") or any(
            int(n) > MAX_WIDTH for n in re.findall(r"\d{1,9}", spec or "")
        ):
            raise TemplateError(
                f"format offers fields of up to {MAX_WIDTH} characters, not {spec!r}"
            )
        if not isinstance(value, int | float) or conversion:
            value = ev.text(value)
        text = format(value, spec or "")
        ev.budget.take(text_bytes(text))
        out.append(text)
    return ev.joined(out)


_FIELD = re.compile(r"([^.\[\]]*)((?:\.[^.\[\]]+|\[[^\]]+\])*)\Z")


def _field(name: str) -> tuple[str | int, list[tuple[bool, str | int]]]:
    """``a.b[0]`` as its first name and the steps after it."""
    match = _FIELD.match(name)
    if match is None:
        raise TemplateError(f"format cannot read the field {name!r}")
    first, rest = match.groups()
    path: list[tuple[bool, str | int]] = [
        (part.startswith("."), part[1:]) if part.startswith(".") else (False, number_in(part[1:-1]))
        for part in re.findall(r"\.[^.\[\]]+|\[[^\]]+\]", rest)
    ]
    return number_in(first), path


def number_in(text: str) -> str | int:
    """`text`, as an int if it is written like one."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


_CONVERSION = re.compile(
    r"%(?:\(([^)]*)\))?([#0\- +]*)(\*|\d+)?(?:\.(\*|\d+))?[hlL]?(.)", re.DOTALL
)


def percent(ev: Evaluator, template: Any, values: Any) -> str:
    """``template % values``, one conversion at a time."""
    text = string_of(template, "%")
    rest: list[Any] | None = [*values] if is_list(values) and type(values) is tuple else None
    single: list[Any] = [values]
    out: list[str] = []
    at = 0
    for match in _CONVERSION.finditer(text):
        key, flags, width, precision, kind = match.groups()
        out.append(text[at : match.start()])
        at = match.end()
        for number in (width, precision):
            if number is not None and (number == "*" or len(number) > 4 or int(number) > MAX_WIDTH):
                raise TemplateError(
                    f"% offers fields of up to {MAX_WIDTH} characters, not {match.group()!r}"
                )
        if kind == "%":
            out.append("%")
            continue
        if key is not None:
            if not isinstance(values, dict):
                raise TemplateError("format requires a mapping")
            value: Any = ev.item(values, key)
        else:
            left = single if rest is None else rest
            if not left:
                raise TemplateError("not enough arguments for format string")
            value = left.pop(0)
        if kind in "sra":
            value = ev.text(value) if kind == "s" or not isinstance(value, str) else value
        elif not isinstance(value, int | float) and kind != "c":
            raise TemplateError(f"%{kind} format: a number is required, not {kind_of(value)}")
        spec = f"%{flags}{width or ''}{'.' + precision if precision else ''}{kind}"
        ev.budget.take(
            (10 if kind in "ra" else 1) * (text_bytes(value) if isinstance(value, str) else 1000)
        )
        out.append(spec % (value,))
    out.append(text[at:])
    if rest or (rest is None and single and not isinstance(values, dict | list)):
        raise TemplateError("not all arguments converted during string formatting")
    if "%" in _CONVERSION.sub("", text):
        raise TemplateError("incomplete format")
    return ev.joined(out)


def _view(name: str) -> Call:
    function = getattr(dict, name)
    return lambda ev, value: ev.budget.view(function(value), value)


def _get(ev: Evaluator, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    ev.budget.step(1 + ev.budget.weight(key) // 64)
    return value.get(key, default)


def _index(ev: Evaluator, value: Any, item: Any) -> int:
    for i, each in enumerate(ev.iterate(value)):
        if ev.equal(each, item):
            return i
    raise TemplateError("the item is not in the list")


def _count(ev: Evaluator, value: Any, item: Any) -> int:
    return sum(ev.equal(each, item) for each in ev.iterate(value))


_BOUNDED = (
    "endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric "
    "isprintable isspace istitle isupper lstrip removeprefix removesuffix rfind rindex rstrip startswith strip count"
)
_SEQUENCE: dict[str, Call] = {
    "index": _index,
    "count": _count,
    "copy": lambda ev, value: ev.listed(value),
}
METHODS: Mapping[type, Mapping[str, Call]] = {
    str: {
        **{name: _method(name) for name in _BOUNDED.split()},
        **{name: _method(name, 3) for name in ["upper", "lower", "title", "capitalize", "swapcase", "casefold"]},
        **{name: _padded(name) for name in ["center", "ljust", "rjust", "zfill"]},
        "split": _split("split"), "rsplit": _split("rsplit"), "splitlines": splitlines,
        "partition": _partition("partition"), "rpartition": _partition("rpartition"),
        "replace": str_replace, "join": _join, "expandtabs": _expandtabs, "format": _format,
    },
    list: _SEQUENCE,
    tuple: {name: _SEQUENCE[name] for name in ("index", "count")},
    dict: {
        "items": _view("items"), "keys": _view("keys"), "values": _view("values"), "get": _get,
        "copy": lambda ev, value: ev.budget.container(dict(value)),
    },
    float: {"is_integer": lambda ev, value: value.is_integer()},
    int: {"bit_length": lambda ev, value: value.bit_length()},
}  # fmt: skip
