"""Filters, tests and methods of chat templates, each with its cost counted before it is paid.

What jinja2 does is done by jinja2's own functions wherever their output has a bound that is known beforehand.
"""

from __future__ import annotations

import json
import operator
import re
import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Undefined, filters, tests

from kbit.text.budget import TemplateError, kind_of, text_bytes
from kbit.text.evaluate import VIEWS, Function, Macro

if TYPE_CHECKING:
    from kbit.text.evaluate import Evaluator

MAX_WIDTH = 1000
"""Widest field of a format, in characters."""

Filter = Callable[..., Any]


def _width(value: Any, what: str) -> int:
    if not isinstance(value, int):
        raise TemplateError(f"{what} takes an int, not a {kind_of(value)}")
    if abs(value) > 1 << 20:
        raise TemplateError(f"{what} of {value} is beyond {1 << 20}")
    return int(value)


def _text(ev: Evaluator, value: Any, factor: int = 1, extra: int = 0) -> str:
    """`value` as text, with `factor` times its bytes and `extra` characters taken for what is made of it."""
    text = ev.text(value)
    ev.budget.take(factor * (text_bytes(text) + 4 * extra))
    return text


def _on_text(function: Callable[[str], Any], factor: int = 1) -> Filter:
    return lambda ev, value: function(_text(ev, value, factor))


# Methods of str, list, tuple and dict. A method takes the evaluator, the value and the arguments.


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TemplateError(f"{what} takes strings, not a {kind_of(value)}")
    return value


def _short(text: str, limit: int, what: str) -> str:
    """`text`, if what is done to it may cost more than its length."""
    if len(text) > limit:
        raise TemplateError(f"{what} of {len(text)} characters; at most {limit} are taken")
    return text


def _method(name: str, factor: int = 1) -> Filter:
    """A method of str whose result is bounded by `factor` times the text."""
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, *args: Any, **kwargs: Any) -> Any:
        ev.budget.take(factor * text_bytes(value))
        if name.endswith("strip") and args and isinstance(args[0], str):
            _short(args[0], 256, f"a set for {name}")
        return function(value, *args, **kwargs)

    return call


def _padded(name: str) -> Filter:
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, width: Any, *fill: Any) -> str:
        ev.budget.take(text_bytes(value) + 4 * abs(_width(width, name)))
        return function(value, width, *fill)

    return call


def _split(name: str) -> Filter:
    function = getattr(str, name)

    def call(ev: Evaluator, value: str, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        parts = len(value) // 2 + 1 if sep is None else value.count(_string(sep, name)) + 1 if sep else 1
        limit = _width(maxsplit, name)
        parts = min(parts, limit + 1) if limit >= 0 else parts
        ev.budget.take(text_bytes(value) + 64 * parts)
        return ev.budget.made(function(value, sep, limit))

    return call


def _splitlines(ev: Evaluator, value: str, keepends: Any = False) -> list[str]:
    lines = sum(map(value.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) + 1
    ev.budget.take(text_bytes(value) + 64 * lines)
    return ev.budget.made(value.splitlines(bool(keepends)))


def _partition(name: str) -> Filter:
    function = getattr(str, name)
    return lambda ev, value, sep: ev.budget.container(function(_text(ev, value), _string(sep, name)))


def _str_replace(ev: Evaluator, value: str, old: Any, new: Any, count: Any = -1) -> str:
    limit = -1 if count is None else _width(count, "replace")
    found = value.count(_string(old, "replace"))
    found = min(found, limit) if limit >= 0 else found
    wide = 1 if value.isascii() and _string(new, "replace").isascii() else 4
    ev.budget.take(wide * (len(value) + found * max(0, len(new) - len(old))))
    return value.replace(old, new, limit)


def _join(ev: Evaluator, separator: str, items: Any) -> str:
    parts = [_string(item, "join") for item in ev.iterate(items)]
    ev.budget.take(sum(map(text_bytes, parts)) + text_bytes(separator) * len(parts))
    return separator.join(parts)


def _expandtabs(ev: Evaluator, value: str, tabsize: Any = 8) -> str:
    ev.budget.take(text_bytes(value) + 4 * value.count("\t") * abs(_width(tabsize, "expandtabs")))
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
            value = ev.attribute(value, key) if is_attribute else ev.item(value, key)
        if conversion is not None and conversion != "s":
            raise TemplateError(f"format offers the conversion !s, not !{conversion}")
        if "{" in (spec or "") or any(int(n) > MAX_WIDTH for n in re.findall(r"\d{1,9}", spec or "")):
            raise TemplateError(f"format offers fields of up to {MAX_WIDTH} characters, not {spec!r}")
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
        (part.startswith("."), part[1:]) if part.startswith(".") else (False, _number(part[1:-1]))
        for part in re.findall(r"\.[^.\[\]]+|\[[^\]]+\]", rest)
    ]
    return _number(first), path


def _number(text: str) -> str | int:
    return int(text) if text.isdecimal() and len(text) < 10 else text


_CONVERSION = re.compile(r"%(?:\(([^)]*)\))?([#0\- +]*)(\*|\d+)?(?:\.(\*|\d+))?[hlL]?(.)", re.DOTALL)


def _percent(ev: Evaluator, template: Any, values: Any) -> str:
    """``template % values``, one conversion at a time."""
    text = _string(template, "%")
    rest: list[Any] | None = list(values) if isinstance(values, tuple) else None
    single = [values]
    out: list[str] = []
    at = 0
    for match in _CONVERSION.finditer(text):
        key, flags, width, precision, kind = match.groups()
        out.append(text[at : match.start()])
        at = match.end()
        for number in (width, precision):
            if number is not None and (number == "*" or len(number) > 4 or int(number) > MAX_WIDTH):
                raise TemplateError(f"% offers fields of up to {MAX_WIDTH} characters, not {match.group()!r}")
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
        ev.budget.take((10 if kind in "ra" else 1) * (text_bytes(value) if isinstance(value, str) else 1000))
        out.append(spec % (value,))
    out.append(text[at:])
    if rest or (rest is None and single and not isinstance(values, dict | list)):
        raise TemplateError("not all arguments converted during string formatting")
    if "%" in _CONVERSION.sub("", text):
        raise TemplateError("incomplete format")
    return ev.joined(out)


def _view(name: str) -> Filter:
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
    "endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper lstrip removeprefix removesuffix rfind rindex rstrip startswith strip count"
)
_SEQUENCE: dict[str, Filter] = {"index": _index, "count": _count, "copy": lambda ev, value: ev.listed(value)}
METHODS: Mapping[type, Mapping[str, Filter]] = {
    str: {
        **{name: _method(name) for name in _BOUNDED.split()},
        **{name: _method(name, 3) for name in "upper lower title capitalize swapcase casefold".split()},
        **{name: _padded(name) for name in "center ljust rjust zfill".split()},
        "split": _split("split"), "rsplit": _split("rsplit"), "splitlines": _splitlines,
        "partition": _partition("partition"), "rpartition": _partition("rpartition"),
        "replace": _str_replace, "join": _join, "expandtabs": _expandtabs, "format": _format,
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


# Filters


def _tojson(
    ev: Evaluator, value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    wide = len(indent) if isinstance(indent, str) else _width(indent or 0, "indent")
    if wide > 64:
        raise TemplateError(f"tojson indents by at most 64, not {wide}")
    weight = ev.budget.weight(value)
    if wide:
        # Each item stands on a line of its own, as deep as it is nested.
        deep = ev.budget.depth(value)
        ev.budget.take(weight * (wide * deep + 1))
    ev.budget.take((12 if ensure_ascii else 6) * weight)
    if separators is not None:
        separators = tuple(_text(ev, each, 1 + weight) for each in ev.iterate(separators))
    return json.dumps(value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys))


def _default(ev: Evaluator, value: Any, default_value: Any = "", boolean: Any = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _length(ev: Evaluator, value: Any) -> int:
    if not hasattr(value, "__len__"):
        raise TemplateError(f"object of type {kind_of(value)!r} has no len()")
    return len(value)


def _first(ev: Evaluator, value: Any) -> Any:
    for item in ev.iterate(value):
        return item
    return ev.environment.undefined("No first item, sequence was empty.")


def _last(ev: Evaluator, value: Any) -> Any:
    if isinstance(value, (Undefined, dict, range, str, list, tuple, *VIEWS)):
        for item in reversed(cast("Any", value)) if not isinstance(value, Undefined) else ():
            return item
        return ev.environment.undefined("No last item, sequence was empty.")
    raise TemplateError(f"{kind_of(value)!r} object is not reversible")


def _joined(ev: Evaluator, value: Any, d: Any = "", attribute: Any = None) -> str:
    pick = _picker(ev, attribute) if attribute is not None else None
    parts = [ev.text(item if pick is None else pick(item)) for item in ev.iterate(value)]
    separator = ev.text(d)
    ev.budget.take(sum(map(text_bytes, parts)) + text_bytes(separator) * len(parts))
    return separator.join(parts)


def _reverse(ev: Evaluator, value: Any) -> Any:
    if isinstance(value, str):
        return _text(ev, value)[::-1]
    return reversed(ev.listed(value))


def _items(ev: Evaluator, value: Any) -> Any:
    if isinstance(value, Undefined):
        return iter([])
    if not isinstance(value, dict):
        raise TemplateError("Can only get item pairs from a mapping.")
    return iter(ev.listed(value.items()))


def _replace(ev: Evaluator, value: Any, old: Any, new: Any, count: Any = None) -> str:
    return _str_replace(ev, ev.text(value), ev.text(old), ev.text(new), count)


def _indent(ev: Evaluator, value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> str:
    text = ev.text(value)
    by = width if isinstance(width, str) else " " * _width(width, "indent")
    lines = len(_splitlines(ev, text))
    ev.budget.take(2 * text_bytes(text) + (16 + text_bytes(by)) * (lines + 2))
    return filters.do_indent(text, by, bool(first), bool(blank))


def _center(ev: Evaluator, value: Any, width: Any = 80) -> str:
    return _text(ev, value, extra=abs(_width(width, "center"))).center(width)


def _wordwrap(
    ev: Evaluator, value: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> str:  # fmt: skip
    text = _short(_text(ev, value, 30), 1 << 14, "wordwrap")
    by = "\n" if wrapstring is None else ev.text(wrapstring)
    ev.budget.take(text_bytes(by) * (len(text) + 1))
    return filters.do_wordwrap(
        ev.environment, text, _width(width, "wordwrap"), bool(break_long_words), by, bool(break_on_hyphens)
    )


def _truncate(ev: Evaluator, value: Any, length: Any = 255, killwords: Any = False, end: Any = "...", leeway: Any = None) -> str:
    text = _text(ev, value, 2)
    return filters.do_truncate(ev.environment, text, _width(length, "truncate"), bool(killwords), ev.text(end), leeway)


def _batch(ev: Evaluator, value: Any, linecount: Any, fill_with: Any = None) -> Any:
    size = _width(linecount, "batch")
    ev.budget.take(64 + 8 * abs(size))
    return iter(_rows(ev, filters.do_batch(ev.listed(value), size, fill_with)))


def _slice(ev: Evaluator, value: Any, slices: Any, fill_with: Any = None) -> Any:
    count = _width(slices, "slice")
    ev.budget.take(64 + 80 * abs(count))
    return iter(_rows(ev, filters.sync_do_slice(ev.listed(value), count, fill_with)))


def _rows(ev: Evaluator, rows: Any) -> list[Any]:
    return ev.budget.container([ev.budget.container(row) for row in rows])


def _picker(ev: Evaluator, attribute: Any, default: Any = None) -> Callable[[Any], Any]:
    """What ``attribute="a.b.0"`` picks from an item."""
    parts = [_number(part) for part in attribute.split(".")] if isinstance(attribute, str) else [attribute]

    def pick(item: Any) -> Any:
        for part in parts:
            item = ev.item(item, part)
            if default is not None and isinstance(item, Undefined):
                item = default
        return item

    return pick


def _caseless(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _keys(ev: Evaluator, items: list[Any], case_sensitive: Any, attribute: Any) -> list[Any]:
    """What the items are ordered by."""
    names = attribute.split(",") if isinstance(attribute, str) else [attribute]
    picks = [_picker(ev, name) if name is not None else None for name in names]
    keys: list[Any] = []
    for item in items:
        parts = [item if pick is None else pick(item) for pick in picks]
        for part in parts:
            ev.budget.step(1 + ev.budget.weight(part) // 64)
        keys.append([part if case_sensitive else _caseless(part) for part in parts])
    return keys


def _sorted(ev: Evaluator, items: list[Any], keys: list[Any], reverse: Any) -> list[Any]:
    # A comparison reads at most the longest key; an order takes about n log n of them.
    longest = max((sum(ev.budget.weight(part) for part in key) for key in keys), default=0)
    ev.budget.step(1 + len(items) * len(items).bit_length() * (1 + longest // 64))
    order = sorted(range(len(items)), key=keys.__getitem__, reverse=bool(reverse))
    return ev.budget.container([items[i] for i in order])


def _sort(ev: Evaluator, value: Any, reverse: Any = False, case_sensitive: Any = False, attribute: Any = None) -> list[Any]:
    items = ev.listed(value)
    return _sorted(ev, items, _keys(ev, items, case_sensitive, attribute), reverse)


def _dictsort(ev: Evaluator, value: Any, case_sensitive: Any = False, by: Any = "key", reverse: Any = False) -> list[Any]:
    if by not in ("key", "value"):
        raise TemplateError('You can only sort by either "key" or "value"')
    if not isinstance(value, dict):
        raise TemplateError(f"dictsort takes a dict, not a {kind_of(value)}")
    items = [ev.budget.container(pair) for pair in ev.listed(value.items())]
    return _sorted(ev, items, _keys(ev, items, case_sensitive, 0 if by == "key" else 1), reverse)


def _unique(ev: Evaluator, value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
    items = ev.listed(value)
    seen: set[Any] = set()
    kept: list[Any] = []
    for item, key in zip(items, _keys(ev, items, case_sensitive, attribute), strict=True):
        if key[0] not in seen:
            seen.add(key[0])
            kept.append(item)
    return iter(ev.budget.container(kept))


def _groupby(ev: Evaluator, value: Any, attribute: Any, default: Any = None, case_sensitive: Any = False) -> list[Any]:
    items = ev.listed(value)
    pick = _picker(ev, attribute, default)
    ev.budget.step(1 + len(items) * len(items).bit_length() * (1 + max(map(ev.budget.weight, items), default=0) // 64))
    keys = [[pick(item) if case_sensitive else _caseless(pick(item))] for item in items]
    groups: list[tuple[Any, Any, list[Any]]] = []
    for i in sorted(range(len(items)), key=keys.__getitem__):
        if not groups or groups[-1][0] != keys[i]:
            groups.append((keys[i], pick(items[i]), []))
        groups[-1][2].append(items[i])
    return ev.budget.container([ev.budget.container((name, ev.budget.container(group))) for _, name, group in groups])


def _extreme(pick_one: Callable[..., Any]) -> Filter:
    def call(ev: Evaluator, value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
        items = ev.listed(value)
        if not items:
            return ev.environment.undefined("No aggregated item, sequence was empty.")
        keys = _keys(ev, items, case_sensitive, attribute)
        return items[pick_one(range(len(items)), key=keys.__getitem__)]

    return call


def _sum(ev: Evaluator, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    pick = _picker(ev, attribute) if attribute is not None else None
    for item in ev.iterate(value):
        start = ev.binary("+", start, item if pick is None else pick(item))
    return start


def _map(ev: Evaluator, value: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and "attribute" in kwargs:
        pick = _picker(ev, kwargs.pop("attribute"), kwargs.pop("default", None))
        if kwargs:
            raise TemplateError(f"Unexpected keyword argument {next(iter(kwargs))!r}")
        made = [pick(item) for item in ev.iterate(value)]
    elif args:
        name = _string(args[0], "map")
        made = [ev.filtered(name, item, list(args[1:]), dict(kwargs)) for item in ev.iterate(value)]
    else:
        raise TemplateError("map requires a filter argument")
    return iter(ev.budget.container(made))


def _selector(keep: bool, by_attribute: bool) -> Filter:
    def call(ev: Evaluator, value: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if by_attribute and not given:
            raise TemplateError("Missing parameter for attribute name")
        pick = _picker(ev, given.pop(0)) if by_attribute else None
        name = _string(given.pop(0), "select") if given else None
        kept: list[Any] = []
        for item in ev.iterate(value):
            tested = item if pick is None else pick(item)
            held = bool(tested) if name is None else ev.tested(name, tested, given, kwargs)
            if bool(held) == keep:
                kept.append(item)
        return iter(ev.budget.container(kept))

    return call


def _round(ev: Evaluator, value: Any, precision: Any = 0, method: Any = "common") -> float:
    if abs(_width(precision, "round")) > 300:
        raise TemplateError(f"round to {precision} digits is beyond 300")
    return filters.do_round(ev.number(value), precision, method)


def _int(ev: Evaluator, value: Any, default: Any = 0, base: Any = 10) -> int:
    if isinstance(value, str) and len(value) > 1000:
        raise TemplateError(f"int of a string of {len(value)} characters; at most 1000 are read")
    return filters.do_int(value, default, base)


def _float(ev: Evaluator, value: Any, default: Any = 0.0) -> float:
    if isinstance(value, str) and len(value) > 1000:
        raise TemplateError(f"float of a string of {len(value)} characters; at most 1000 are read")
    return filters.do_float(value, default)


def _attr(ev: Evaluator, value: Any, name: Any) -> Any:
    if _string(name, "attr").startswith("_"):
        raise TemplateError(f"access to attribute {name!r} of {kind_of(value)!r} object is unsafe")
    found = ev.method(value, name)
    return found if found is not None else ev.environment.undefined(obj=value, name=name)


def _trim(ev: Evaluator, value: Any, chars: Any = None) -> str:
    return _text(ev, value).strip(None if chars is None else _short(_string(chars, "trim"), 256, "a set for trim"))


def _striptags(ev: Evaluator, value: Any) -> str:
    return filters.do_striptags(_short(_text(ev, value, 30), 1 << 16, "striptags"))


def _escape(ev: Evaluator, value: Any) -> str:
    return str(filters.escape(_text(ev, value, 5)))


def _urlencode(ev: Evaluator, value: Any) -> str:
    if isinstance(value, str):
        return filters.do_urlencode(_text(ev, value, 12))
    ev.budget.take(120 * ev.budget.weight(value))
    return filters.do_urlencode(value)


def _wordcount(ev: Evaluator, value: Any) -> int:
    return sum(1 for _ in ev.iterate(cast("Any", re.findall(r"\w+", _text(ev, value, 30)))))


def _abs(ev: Evaluator, value: Any) -> Any:
    return abs(ev.number(value))


FILTERS: Mapping[str, Filter] = {
    "%": _percent,
    "abs": _abs, "attr": _attr, "batch": _batch, "center": _center, "count": _length, "d": _default, "default": _default,
    "capitalize": _on_text(str.capitalize, 3), "dictsort": _dictsort, "e": _escape, "escape": _escape,
    "filesizeformat": lambda ev, value, binary=False: filters.do_filesizeformat(ev.number(value), bool(binary)),
    "first": _first, "float": _float, "format": lambda ev, value, *args, **kwargs: _percent(ev, ev.text(value), kwargs or args),
    "groupby": _groupby, "indent": _indent, "int": _int, "items": _items, "join": _joined, "last": _last, "length": _length,
    "list": lambda ev, value: ev.listed(value), "lower": _on_text(str.lower, 3), "map": _map, "max": _extreme(max),
    "min": _extreme(min), "reject": _selector(False, False), "rejectattr": _selector(False, True), "replace": _replace,
    "reverse": _reverse, "round": _round, "safe": _on_text(str), "select": _selector(True, False),
    "selectattr": _selector(True, True), "slice": _slice, "sort": _sort, "string": _on_text(str),
    "striptags": _striptags, "sum": _sum, "title": _on_text(filters.do_title, 30),
    "tojson": _tojson, "trim": _trim, "truncate": _truncate, "unique": _unique, "upper": _on_text(str.upper, 3),
    "urlencode": _urlencode, "wordcount": _wordcount, "wordwrap": _wordwrap,
}  # fmt: skip


# Tests


def _compared(op: str) -> Filter:
    return lambda ev, value, other: ev.compared(op, value, other)


def _plain(function: Callable[..., bool]) -> Filter:
    return lambda ev, value, *args: function(value, *args)


def _case(name: str) -> Filter:
    function: Callable[[str], bool] = operator.methodcaller(name)
    return lambda ev, value: function(_text(ev, value))


def _divisible(ev: Evaluator, value: Any, by: Any) -> bool:
    return ev.number(value) % ev.number(by) == 0


TESTS: Mapping[str, Filter] = {
    "defined": _plain(tests.test_defined), "undefined": _plain(tests.test_undefined), "none": _plain(tests.test_none),
    "boolean": _plain(tests.test_boolean), "true": _plain(tests.test_true), "false": _plain(tests.test_false),
    "integer": _plain(tests.test_integer), "float": _plain(tests.test_float), "number": _plain(tests.test_number),
    "string": _plain(tests.test_string), "mapping": _plain(tests.test_mapping), "sequence": _plain(tests.test_sequence),
    "iterable": _plain(tests.test_iterable), "sameas": _plain(tests.test_sameas),
    "callable": lambda ev, value: isinstance(value, Function | Macro),
    "escaped": lambda ev, value: False,
    "filter": lambda ev, value: value in FILTERS and value != "%", "test": lambda ev, value: value in TESTS,
    "in": lambda ev, value, container: ev.contains(container, value),
    "odd": lambda ev, value: ev.number(value) % 2 == 1, "even": lambda ev, value: ev.number(value) % 2 == 0,
    "divisibleby": _divisible, "lower": _case("islower"), "upper": _case("isupper"),
    **dict.fromkeys(("eq", "==", "equalto"), _compared("eq")), **dict.fromkeys(("ne", "!="), _compared("ne")),
    **dict.fromkeys(("lt", "<", "lessthan"), _compared("lt")), **dict.fromkeys(("le", "<="), _compared("lteq")),
    **dict.fromkeys(("gt", ">", "greaterthan"), _compared("gt")), **dict.fromkeys(("ge", ">="), _compared("gteq")),
}  # fmt: skip
