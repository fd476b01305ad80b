"""Filters and tests of chat templates, each with its cost counted before it is paid.

What jinja2 does is done by jinja2's own functions wherever their output has a bound that is known
beforehand.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import markupsafe
from jinja2 import Undefined, filters, tests

from kbit.text.budget import kind_of, text_bytes
from kbit.text.evaluate import VIEWS
from kbit.text.kinds import TemplateError
from kbit.text.methods import (
    as_text,
    number_in,
    percent,
    short,
    splitlines,
    str_replace,
    string_of,
    width_of,
)  # fmt: skip
from kbit.text.values import Function, Macro

if TYPE_CHECKING:
    from kbit.text.evaluate import Evaluator
    from kbit.text.methods import Call


def _on_text(function: Callable[[str], Any], factor: int = 1) -> Call:
    return lambda ev, value: function(as_text(ev, value, factor))


def _tojson(
    ev: Evaluator,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> str:
    wide = len(indent) if isinstance(indent, str) else width_of(indent or 0, "indent")
    if wide > 64:
        raise TemplateError(f"tojson indents by at most 64, not {wide}")
    weight = ev.budget.weight(value)
    if wide:
        # Each item stands on a line of its own, as deep as it is nested.
        deep = ev.budget.depth(value)
        ev.budget.take(weight * (wide * deep + 1))
    ev.budget.take((12 if ensure_ascii else 6) * weight)
    if separators is not None:
        separators = tuple(as_text(ev, each, 1 + weight) for each in ev.iterate(separators))
    return json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )


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
        for item in reversed(value) if not isinstance(value, Undefined) else ():
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
        return as_text(ev, value)[::-1]
    return reversed(ev.listed(value))


def _items(ev: Evaluator, value: Any) -> Any:
    if isinstance(value, Undefined):
        return iter([])
    if not isinstance(value, dict):
        raise TemplateError("Can only get item pairs from a mapping.")
    return iter(ev.listed(value.items()))


def _replace(ev: Evaluator, value: Any, old: Any, new: Any, count: Any = None) -> str:
    return str_replace(ev, ev.text(value), ev.text(old), ev.text(new), count)


def _indent(
    ev: Evaluator, value: Any, width: Any = 4, first: Any = False, blank: Any = False
) -> str:
    text = ev.text(value)
    by = width if isinstance(width, str) else " " * width_of(width, "indent")
    lines = len(splitlines(ev, text))
    ev.budget.take(2 * text_bytes(text) + (16 + text_bytes(by)) * (lines + 2))
    return filters.do_indent(text, by, bool(first), bool(blank))


def _center(ev: Evaluator, value: Any, width: Any = 80) -> str:
    return as_text(ev, value, extra=abs(width_of(width, "center"))).center(width)


def _wordwrap(
    ev: Evaluator, value: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> str:  # fmt: skip
    text = short(as_text(ev, value, 30), 1 << 14, "wordwrap")
    by = "\n" if wrapstring is None else ev.text(wrapstring)
    ev.budget.take(text_bytes(by) * (len(text) + 1))
    return filters.do_wordwrap(
        ev.environment,
        text,
        width_of(width, "wordwrap"),
        bool(break_long_words),
        by,
        bool(break_on_hyphens),
    )


def _truncate(
    ev: Evaluator,
    value: Any,
    length: Any = 255,
    killwords: Any = False,
    end: Any = "...",
    leeway: Any = None,
) -> str:
    text = as_text(ev, value, 2)
    return filters.do_truncate(
        ev.environment, text, width_of(length, "truncate"), bool(killwords), ev.text(end), leeway
    )


def _batch(ev: Evaluator, value: Any, linecount: Any, fill_with: Any = None) -> Any:
    size = width_of(linecount, "batch")
    ev.budget.take(64 + 8 * abs(size))
    return iter(_rows(ev, filters.do_batch(ev.listed(value), size, fill_with)))


def _slice(ev: Evaluator, value: Any, slices: Any, fill_with: Any = None) -> Any:
    count = width_of(slices, "slice")
    ev.budget.take(64 + 80 * abs(count))
    return iter(_rows(ev, filters.sync_do_slice(ev.listed(value), count, fill_with)))


def _rows(ev: Evaluator, rows: Any) -> list[Any]:
    return ev.budget.container([ev.budget.container(row) for row in rows])


def _picker(ev: Evaluator, attribute: Any, default: Any = None) -> Callable[[Any], Any]:
    """What ``attribute="a.b.0"`` picks from an item."""
    parts = (
        [number_in(part) for part in attribute.split(".")]
        if isinstance(attribute, str)
        else [attribute]
    )

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


def _sort(
    ev: Evaluator,
    value: Any,
    reverse: Any = False,
    case_sensitive: Any = False,
    attribute: Any = None,
) -> list[Any]:
    items = ev.listed(value)
    return _sorted(ev, items, _keys(ev, items, case_sensitive, attribute), reverse)


def _dictsort(
    ev: Evaluator, value: Any, case_sensitive: Any = False, by: Any = "key", reverse: Any = False
) -> list[Any]:
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


def _groupby(
    ev: Evaluator, value: Any, attribute: Any, default: Any = None, case_sensitive: Any = False
) -> list[Any]:
    items = ev.listed(value)
    pick = _picker(ev, attribute, default)
    ev.budget.step(
        1
        + len(items)
        * len(items).bit_length()
        * (1 + max(map(ev.budget.weight, items), default=0) // 64)
    )
    keys = [[pick(item) if case_sensitive else _caseless(pick(item))] for item in items]
    groups: list[tuple[Any, Any, list[Any]]] = []
    for i in sorted(range(len(items)), key=keys.__getitem__):
        if not groups or groups[-1][0] != keys[i]:
            groups.append((keys[i], pick(items[i]), []))
        groups[-1][2].append(items[i])
    return ev.budget.container(
        [ev.budget.container((name, ev.budget.container(group))) for _, name, group in groups]
    )


def _extreme(pick_one: Callable[..., Any]) -> Call:
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
        name = string_of(args[0], "map")
        made = [ev.filtered(name, item, list(args[1:]), dict(kwargs)) for item in ev.iterate(value)]
    else:
        raise TemplateError("map requires a filter argument")
    return iter(ev.budget.container(made))


def _selector(keep: bool, by_attribute: bool) -> Call:
    def call(ev: Evaluator, value: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if by_attribute and not given:
            raise TemplateError("Missing parameter for attribute name")
        pick = _picker(ev, given.pop(0)) if by_attribute else None
        name = string_of(given.pop(0), "select") if given else None
        kept: list[Any] = []
        for item in ev.iterate(value):
            tested = item if pick is None else pick(item)
            held = bool(tested) if name is None else ev.tested(name, tested, given, kwargs)
            if bool(held) == keep:
                kept.append(item)
        return iter(ev.budget.container(kept))

    return call


def _round(ev: Evaluator, value: Any, precision: Any = 0, method: Any = "common") -> float:
    if abs(width_of(precision, "round")) > 300:
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
    if string_of(name, "attr").startswith("_"):
        raise TemplateError(f"access to attribute {name!r} of {kind_of(value)!r} object is unsafe")
    found = ev.method(value, name)
    return found if found is not None else ev.environment.undefined(obj=value, name=name)


def _trim(ev: Evaluator, value: Any, chars: Any = None) -> str:
    return as_text(ev, value).strip(
        None if chars is None else short(string_of(chars, "trim"), 256, "a set for trim")
    )


def _striptags(ev: Evaluator, value: Any) -> str:
    return filters.do_striptags(short(as_text(ev, value, 30), 1 << 16, "striptags"))


def _escape(ev: Evaluator, value: Any) -> str:
    return str(markupsafe.escape(as_text(ev, value, 5)))


def _filesizeformat(ev: Evaluator, value: Any, binary: Any = False) -> str:
    return filters.do_filesizeformat(ev.number(value), bool(binary))


def _urlencode(ev: Evaluator, value: Any) -> str:
    if isinstance(value, str):
        return filters.do_urlencode(as_text(ev, value, 12))
    ev.budget.take(120 * ev.budget.weight(value))
    return filters.do_urlencode(value)


def _wordcount(ev: Evaluator, value: Any) -> int:
    return sum(1 for _ in ev.iterate(cast("Any", re.findall(r"\w+", as_text(ev, value, 30)))))


def _abs(ev: Evaluator, value: Any) -> Any:
    return abs(ev.number(value))


FILTERS: Mapping[str, Call] = {
    "%": percent,
    "abs": _abs, "attr": _attr, "batch": _batch, "center": _center, "count": _length, "d": _default,
    "default": _default, "capitalize": _on_text(str.capitalize, 3), "dictsort": _dictsort, "e": _escape,
    "escape": _escape,
    "filesizeformat": _filesizeformat,
    "first": _first, "float": _float, "groupby": _groupby, "indent": _indent, "int": _int, "items": _items,
    "format": lambda ev, value, *args, **kwargs: percent(ev, ev.text(value), kwargs or args),
    "join": _joined, "last": _last, "length": _length,
    "list": lambda ev, value: ev.listed(value), "lower": _on_text(str.lower, 3), "map": _map, "max": _extreme(max),
    "min": _extreme(min), "reject": _selector(False, False), "rejectattr": _selector(False, True), "replace": _replace,
    "reverse": _reverse, "round": _round, "safe": _on_text(str), "select": _selector(True, False),
    "selectattr": _selector(True, True), "slice": _slice, "sort": _sort, "string": _on_text(str),
    "striptags": _striptags, "sum": _sum, "title": _on_text(filters.do_title, 30),
    "tojson": _tojson, "trim": _trim, "truncate": _truncate, "unique": _unique, "upper": _on_text(str.upper, 3),
    "urlencode": _urlencode, "wordcount": _wordcount, "wordwrap": _wordwrap,
}  # fmt: skip


# Tests


def _compared(op: str) -> Call:
    def call(ev: Evaluator, value: Any, other: Any) -> bool:
        return ev.compared(op, value, other)

    return call


def _plain(function: Callable[..., bool]) -> Call:
    return lambda ev, value, *args: function(value, *args)


def _case(name: str) -> Call:
    function: Callable[[str], bool] = operator.methodcaller(name)
    return lambda ev, value: function(as_text(ev, value))


def _in(ev: Evaluator, value: Any, container: Any) -> bool:
    return ev.contains(container, value)


def _divisible(ev: Evaluator, value: Any, by: Any) -> bool:
    return ev.number(value) % ev.number(by) == 0


TESTS: Mapping[str, Call] = {
    "defined": _plain(tests.test_defined), "undefined": _plain(tests.test_undefined), "none": _plain(tests.test_none),
    "boolean": _plain(tests.test_boolean), "true": _plain(tests.test_true), "false": _plain(tests.test_false),
    "integer": _plain(tests.test_integer), "float": _plain(tests.test_float), "number": _plain(tests.test_number),
    "string": _plain(tests.test_string), "mapping": _plain(tests.test_mapping), "sequence": _plain(tests.test_sequence),
    "iterable": _plain(tests.test_iterable), "sameas": _plain(tests.test_sameas),
    "callable": lambda ev, value: isinstance(value, Function | Macro),
    "escaped": lambda ev, value: False,
    "filter": lambda ev, value: value in FILTERS and value != "%", "test": lambda ev, value: value in TESTS,
    "in": _in,
    "odd": lambda ev, value: ev.number(value) % 2 == 1, "even": lambda ev, value: ev.number(value) % 2 == 0,
    "divisibleby": _divisible, "lower": _case("islower"), "upper": _case("isupper"),
    **dict.fromkeys(("eq", "==", "equalto"), _compared("eq")), **dict.fromkeys(("ne", "!="), _compared("ne")),
    **dict.fromkeys(("lt", "<", "lessthan"), _compared("lt")), **dict.fromkeys(("le", "<="), _compared("lteq")),
    **dict.fromkeys(("gt", ">", "greaterthan"), _compared("gt")), **dict.fromkeys(("ge", ">="), _compared("gteq")),
}  # fmt: skip
