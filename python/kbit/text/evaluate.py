"""An evaluator of jinja2's syntax tree in which every step and every byte is counted before it is spent.

jinja2 parses; this runs. Its own sandbox keeps a template from Python, not from time and memory. Values are plain data
(None, bool, int, float, str, list, tuple, dict, range, undefined) and the few kinds of object below, so there is no
attribute of Python to reach for.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, cast

from jinja2 import Environment, Undefined, nodes

from kbit.text.budget import Budget, kind_of, text_bytes
from kbit.text.kinds import TemplateError, is_dict, is_list
from kbit.text.values import Function, Loop, Macro, Namespace, Scope

MAX_DEPTH = 200
"""Statements and expressions inside one another while running, macros included: about two Python frames each."""
MAX_INT_BITS = 4096
_NONE: dict[str, str] = {}
VIEWS: tuple[type, ...] = (type(_NONE.keys()), type(_NONE.values()), type(_NONE.items()))
ITERATORS: tuple[type, ...] = (type(iter([""])), type(reversed([""])))
ITERABLE: tuple[Any, ...] = (str, list, tuple, dict, range, Undefined, *VIEWS, *ITERATORS)


def _holders(names: dict[str, Any], name: str) -> int:
    """Reference count of a variable's value, seen from here."""
    value = names[name]
    return sys.getrefcount(value)


_ALONE = _holders({"x": "".join(["a", "fresh", "string"])}, "x")
"""What `_holders` says of a value that nothing else holds; differs between versions of Python."""


if TYPE_CHECKING:
    Calls = Mapping[str, Callable[Concatenate["Evaluator", Any, ...], Any]]


class Evaluator:
    """One rendering of one template.

    Args:
        environment: What parsed the template; makes undefined values.
        filters: Filters by name: ``filter(evaluator, value, *args, **kwargs)``.
        tests: Tests by name, called in the same way.
        methods: Of a type's name, the methods a template may call: ``method(evaluator, value, *args, **kwargs)``.
        names: Variables and functions the template sees.
        budget: What it may spend.
    """

    def __init__(
        self,
        environment: Environment,
        filters: Calls,
        tests: Calls,
        methods: Mapping[type, Calls],
        names: dict[str, Any],
        budget: Budget,
    ) -> None:
        self.environment = environment
        self.filters = filters
        self.tests = tests
        self.methods = methods
        self.budget = budget
        self.line = 1
        self._depth = 0
        self._globals = Scope(None, names)
        self._expressions: dict[type, Callable[[Any, Scope], Any]] = {
            nodes.Const: lambda node, _: node.value,
            nodes.TemplateData: lambda node, _: node.data,
            nodes.Name: self._name,
            nodes.Getattr: lambda node, scope: self.attribute(self.value(node.node, scope), node.attr),
            nodes.Getitem: self._getitem,
            nodes.Call: self._call,
            nodes.Filter: self._filter,
            nodes.Test: self._test,
            nodes.CondExpr: self._cond,
            nodes.And: lambda node, scope: self.value(node.left, scope) and self.value(node.right, scope),
            nodes.Or: lambda node, scope: self.value(node.left, scope) or self.value(node.right, scope),
            nodes.Not: lambda node, scope: not self.value(node.node, scope),
            nodes.Neg: lambda node, scope: -self.number(self.value(node.node, scope)),
            nodes.Pos: lambda node, scope: +self.number(self.value(node.node, scope)),
            nodes.Compare: self._compare,
            nodes.Concat: self._concat,
            nodes.List: lambda node, scope: self.budget.container(self._values(node, scope)),
            nodes.Tuple: lambda node, scope: self.budget.container(tuple(self._values(node, scope))),
            nodes.Dict: self._dict,
            nodes.Add: self._binary, nodes.Sub: self._binary, nodes.Mul: self._binary, nodes.Div: self._binary,
            nodes.FloorDiv: self._binary, nodes.Mod: self._binary, nodes.Pow: self._binary,
        }  # fmt: skip
        self._statements: dict[type, Callable[[Any, Scope, list[str]], str | None]] = {
            nodes.Output: self._output,
            nodes.If: self._if,
            nodes.For: self._for,
            nodes.Assign: self._assign,
            nodes.AssignBlock: self._assign_block,
            nodes.Macro: self._macro,
            nodes.CallBlock: self._call_block,
            nodes.FilterBlock: self._filter_block,
            nodes.With: self._with,
            nodes.Scope: lambda node, scope, out: self.run(node.body, Scope(scope, {}), out),
            nodes.Break: lambda node, scope, out: "break",
            nodes.Continue: lambda node, scope, out: "continue",
        }

    # Statements: what they print goes to `out`; they return "break" or "continue" to the loop around them.

    def render(self, template: nodes.Template) -> str:
        """The text of the whole template."""
        out: list[str] = []
        self.run(template.body, Scope(self._globals, {}), out)
        self.budget.take(sum(map(text_bytes, out)))
        return "".join(out)

    def run(self, body: list[nodes.Node], scope: Scope, out: list[str]) -> str | None:
        """Run statements in order."""
        for node in body:
            self.line = node.lineno
            statement = self._statements.get(type(node))
            if statement is None:
                raise TemplateError(
                    f"{{% {type(node).__name__.lower()} %}} is not offered to chat templates"
                )
            self._enter()
            jump = statement(node, scope, out)
            self._depth -= 1
            if jump is not None:
                return jump
        return None

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TemplateError(f"the template runs more than {MAX_DEPTH} levels deep")
        self.budget.step()

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for child in node.nodes:
            text = self.text(self.value(child, scope))
            if text:
                self.budget.take(8 + text_bytes(text))
                out.append(text)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> str | None:
        if self.value(node.test, scope):
            return self.run(node.body, scope, out)
        for branch in node.elif_:
            self.line = branch.lineno
            if self.value(branch.test, scope):
                return self.run(branch.body, scope, out)
        return self.run(node.else_, scope, out)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        self._loop(node, self.value(node.iter, scope), scope, out, 0)

    def _loop(
        self, node: nodes.For, iterable: Any, scope: Scope, out: list[str], depth: int
    ) -> None:
        known: Any = iterable if node.test is None else None
        items = self.iterate(iterable)
        if node.test is not None:
            items = (
                item
                for item in items
                if self.value(node.test, self._bound(node.target, item, scope))
            )

        def recurse(inner: Any) -> str:
            inner_out: list[str] = []
            self._enter()
            self._loop(node, inner, scope, inner_out, depth + 1)
            self._depth -= 1
            return self.joined(inner_out)

        loop = Loop(self.budget, items, known, depth, recurse if node.recursive else None)
        ran = False
        while loop.advance():
            ran = True
            inner = self._bound(node.target, loop.current[0], scope)
            inner.names["loop"] = loop
            if self.run(node.body, inner, out) == "break":
                break
        if not ran:
            self.run(node.else_, Scope(scope, {}), out)

    def _bound(self, target: nodes.Node, item: Any, scope: Scope) -> Scope:
        inner = Scope(scope, {})
        self._store(target, item, inner)
        return inner

    def _assign(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self._store(node.target, self.value(node.node, scope), scope)

    def _store(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            self._replace(scope.names, target.name, value)
        elif isinstance(target, nodes.NSRef):
            namespace = self._lookup(target.name, scope)
            if not isinstance(namespace, Namespace):
                raise TemplateError("cannot assign attribute on non-namespace object")
            if target.attr.startswith("_"):
                raise TemplateError(f"a namespace takes no attribute {target.attr!r}")
            self._replace(namespace.attributes, target.attr, value)
        elif isinstance(target, nodes.Tuple):
            values = list(self.iterate(value))
            if len(values) != len(target.items):
                raise TemplateError(f"{len(values)} values for {len(target.items)} names")
            for name, each in zip(target.items, values, strict=True):
                self._store(name, each, scope)
        else:
            raise TemplateError(f"cannot assign to {type(target).__name__}")

    def _replace(self, names: dict[str, Any], name: str, value: Any) -> None:
        """Assign; a text that nothing else holds is free again (``ns.out = ns.out + piece`` in a loop)."""
        if type(names.get(name)) is str and _holders(names, name) == _ALONE:
            self.budget.give(text_bytes(names[name]))
        names[name] = value

    def _assign_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        value: Any = self._captured(node.body, Scope(scope, {}))
        if node.filter is not None:
            value = self._filter(node.filter, scope, value)
        self._store(node.target, value, scope)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        text = self.text(
            self._filter(node.filter, scope, self._captured(node.body, Scope(scope, {})))
        )
        self.budget.take(text_bytes(text))
        out.append(text)

    def _captured(self, body: list[nodes.Node], scope: Scope) -> str:
        out: list[str] = []
        self.run(body, scope, out)
        return self.joined(out)

    def joined(self, out: list[str]) -> str:
        """Pieces as one text."""
        self.budget.take(sum(map(text_bytes, out)))
        return "".join(out)

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> str | None:
        inner = Scope(scope, {})
        for target, value in zip(node.targets, node.values, strict=True):
            self._store(target, self.value(value, scope), inner)
        return self.run(node.body, inner, out)

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = Macro(node.name, node, scope)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = Macro("caller", node, scope)
        text = self.text(self._call(node.call, scope, {"caller": caller}))
        self.budget.take(text_bytes(text))
        out.append(text)

    def _invoke(self, macro: Macro, args: list[Any], kwargs: dict[str, Any]) -> str:
        self.budget.step(10)  # scopes, arguments and a text of its own
        names: dict[str, Any] = dict(zip(macro.params, args, strict=False))
        rest = args[len(macro.params) :]
        caller = kwargs.pop("caller", None)
        for name in macro.params:
            if name in kwargs:
                if name in names:
                    raise TemplateError(f"macro {macro.name!r} got {name!r} twice")
                names[name] = kwargs.pop(name)
        for name, given, what in (("varargs", rest, "positional"), ("kwargs", kwargs, "keyword")):
            if name in macro.uses:
                names[name] = self.budget.container(tuple(rest) if name == "varargs" else kwargs)
            elif given:
                raise TemplateError(
                    f"macro {macro.name!r} takes no {what} argument {next(iter(given))!r}"
                )
        if "caller" in macro.uses:
            names["caller"] = (
                caller if caller is not None else self.environment.undefined("no caller defined")
            )
        elif caller is not None:
            raise TemplateError(
                f"macro {macro.name!r} was invoked with a call block but does not use caller"
            )
        scope = Scope(macro.scope, names)
        offset = len(macro.params) - len(macro.defaults)
        for i, name in enumerate(macro.params):
            if name not in names:
                if i >= offset:
                    names[name] = self.value(macro.defaults[i - offset], scope)
                else:
                    names[name] = self.environment.undefined(
                        f"parameter {name!r} was not provided", name=name
                    )
        return self._captured(macro.body, scope)

    # Expressions

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """The value of an expression."""
        self._enter()
        self.line = node.lineno
        expression = self._expressions.get(type(node))
        if expression is None:
            raise TemplateError(
                f"the expression {type(node).__name__} is not offered to chat templates"
            )
        value = expression(node, scope)
        self._depth -= 1
        return value

    def text(self, value: Any) -> str:
        """How a value prints."""
        if type(value) is str:
            return value
        if isinstance(value, Undefined):
            return str(value)
        weight = self.budget.weight(value)
        self.budget.take(10 * weight)  # the longest escape of a character in a list is \Uxxxxxxxx
        return str(value)

    def number(self, value: Any) -> Any:
        """`value` if arithmetic may be done with it."""
        if isinstance(value, Undefined):
            str(+value)  # raises what jinja2 raises
        if not isinstance(value, int | float):
            raise TemplateError(f"a {kind_of(value)} is no number")
        return value

    def iterate(self, value: Any) -> Iterator[Any]:
        """The items of a value, each counted as a step."""
        if not isinstance(value, ITERABLE):
            raise TemplateError(f"{kind_of(value)!r} object is not iterable")
        return self._counted(value)

    def _counted(self, value: Any) -> Iterator[Any]:
        for item in value:
            self.budget.step()
            yield item

    def listed(self, value: Any) -> list[Any]:
        """The items of a value as a new list."""
        size = operator.length_hint(value)
        self.budget.take(64 + size * (100 if isinstance(value, (str, *VIEWS)) else 40))
        return self.budget.made(list(self.iterate(value)))

    def equal(self, left: Any, right: Any) -> bool:
        """Whether two values are equal."""
        if (is_list(left) or is_dict(left)) and (is_list(right) or is_dict(right)):
            self.budget.step(1 + min(self.budget.weight(left), self.budget.weight(right)) // 8)
        return left == right

    def attribute(self, value: Any, name: str) -> Any:
        """`value.name`: a method, else the item of that name, else undefined."""
        if name.startswith("_"):
            raise TemplateError(
                f"access to attribute {name!r} of {kind_of(value)!r} object is unsafe"
            )
        found = self.method(value, name)
        if found is not None:
            return found
        if isinstance(value, Mapping):
            try:
                return cast("Mapping[Any, Any]", value)[name]
            except KeyError:
                pass
        return self.environment.undefined(obj=value, name=name)

    def method(self, value: Any, name: str) -> Any:
        """An attribute that is no item; None where there is none."""
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()  # pyright: ignore[reportPrivateUsage]
        if isinstance(value, Namespace):
            return value.attributes.get(name)
        if isinstance(value, Loop):
            return value.attribute(name, self.environment)
        if isinstance(value, Macro | Function):
            return None
        kind = cast("type[Any]", type(value))
        call = self.methods.get(kind, {}).get(name)
        if call is not None:
            return Function(name, lambda *args, **kwargs: call(self, value, *args, **kwargs))
        if hasattr(kind, name):
            raise TemplateError(
                f"access to attribute {name!r} of {kind_of(value)!r} object is not offered to chat templates"
            )
        return None

    def item(self, value: Any, key: Any) -> Any:
        """`value[key]`, else an attribute of that name, else undefined."""
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()  # pyright: ignore[reportPrivateUsage]
        if isinstance(value, str | range) or is_list(value) or is_dict(value):
            try:
                self.budget.step(1 + (self.budget.weight(key) // 64 if is_list(key) else 0))
                return cast("Any", value)[key]
            except (TypeError, LookupError):
                pass
        if not isinstance(key, str):
            return self.environment.undefined(obj=value, name=cast("Any", key))
        if key.startswith("_"):
            raise TemplateError(f"attribute {key!r} of {kind_of(value)!r} object is unsafe")
        found = self.method(value, key)
        return self.environment.undefined(obj=value, name=key) if found is None else found

    def call(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a value."""
        if isinstance(target, Macro):
            return self._invoke(target, args, kwargs)
        if isinstance(target, Function):
            return target.call(*args, **kwargs)
        if isinstance(target, Loop) and target.recurse is not None:
            return target.recurse(*args, **kwargs)
        if isinstance(target, Undefined):
            target._fail_with_undefined_error()  # pyright: ignore[reportPrivateUsage]
        raise TemplateError(f"{kind_of(target)!r} object is not callable")

    def filtered(self, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Apply a filter by name."""
        found = self.filters.get(name)
        if found is None:
            raise TemplateError(f"no filter named {name!r} is offered to chat templates")
        return found(self, value, *args, **kwargs)

    def tested(self, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Apply a test by name."""
        found = self.tests.get(name)
        if found is None:
            raise TemplateError(f"no test named {name!r} is offered to chat templates")
        return found(self, value, *args, **kwargs)

    def _lookup(self, name: str, scope: Scope) -> Any:
        inner: Scope | None = scope
        while inner is not None:
            if name in inner.names:
                return inner.names[name]
            inner = inner.outer
        return self.environment.undefined(name=name)

    def _values(self, node: nodes.List | nodes.Tuple, scope: Scope) -> list[Any]:
        return [self.value(item, scope) for item in node.items]

    def _name(self, node: nodes.Name, scope: Scope) -> Any:
        return self._lookup(node.name, scope)

    def _getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        if not isinstance(node.arg, nodes.Slice):
            return self.item(value, self.value(node.arg, scope))
        bounds = [
            None if each is None else self.value(each, scope)
            for each in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        part = slice(*bounds)
        if isinstance(value, str):
            self.budget.take(text_bytes(value))
            return value[part]
        if isinstance(value, range):
            return value[part]
        if is_list(value):
            self.budget.take(64 + 8 * len(value))
            return self.budget.made(value[part])
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()  # pyright: ignore[reportPrivateUsage]
        return self.environment.undefined(obj=value, name=str(part))

    def _arguments(self, node: Any, scope: Scope) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(arg, scope) for arg in node.args]
        kwargs = {pair.key: self.value(pair.value, scope) for pair in node.kwargs}
        if node.dyn_args is not None:
            args += self.listed(self.value(node.dyn_args, scope))
        if node.dyn_kwargs is not None:
            more = self.value(node.dyn_kwargs, scope)
            if not isinstance(more, dict) or not all(
                type(key) is str for key in cast("dict[Any, Any]", more)
            ):
                raise TemplateError(f"** takes a dict with strings for keys, not a {kind_of(more)}")
            kwargs |= cast("dict[str, Any]", more)
        return args, kwargs

    def _call(self, node: nodes.Call, scope: Scope, extra: Mapping[str, Any] = {}) -> Any:
        target = self.value(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self.call(target, args, {**kwargs, **extra})

    def _filter(self, node: nodes.Filter, scope: Scope, *given: Any) -> Any:
        value = given[0] if node.node is None and given else self._filter_input(node, scope, given)
        args, kwargs = self._arguments(node, scope)
        return self.filtered(node.name, value, args, kwargs)

    def _filter_input(self, node: nodes.Filter, scope: Scope, given: tuple[Any, ...]) -> Any:
        if given and isinstance(
            node.node, nodes.Filter
        ):  # a chain on a block starts with the block's text
            return self._filter(node.node, scope, *given)
        return self.value(cast("nodes.Node", node.node), scope)

    def _test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self.value(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self.tested(node.name, value, args, kwargs)

    def _cond(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        if node.expr2 is None:
            return self.environment.undefined(
                "the inline if-expression evaluated to false and no else section was defined."
            )
        return self.value(node.expr2, scope)

    def _compare(self, node: nodes.Compare, scope: Scope) -> Any:
        left = self.value(node.expr, scope)
        result: Any = True
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            result = self.compared(operand.op, left, right)
            if not result:
                return result
            left = right
        return result

    def compared(self, op: str, left: Any, right: Any) -> bool:
        """One comparison."""
        if op == "eq":
            return self.equal(left, right)
        if op == "ne":
            return not self.equal(left, right)
        if op in ("in", "notin"):
            return self.contains(right, left) == (op == "in")
        if is_list(left) or is_list(right):
            self.budget.step(1 + self.budget.weight(left) // 8)
        return self._ordered(op, left, right)

    @staticmethod
    def _ordered(op: str, left: Any, right: Any) -> bool:
        if op == "lt":
            return left < right
        if op == "lteq":
            return left <= right
        if op == "gt":
            return left > right
        return left >= right

    def contains(self, container: Any, value: Any) -> bool:
        """`value in container`."""
        if isinstance(container, (list, tuple, *VIEWS)):
            return any(self.equal(item, value) for item in self.iterate(container))
        if isinstance(container, str | range | Undefined) or is_dict(container):
            if isinstance(container, str):
                self.budget.step(1 + len(container) // 4096)
            if is_list(value):
                self.budget.step(1 + self.budget.weight(value) // 8)
            return value in cast("Any", container)
        raise TemplateError(f"argument of type {kind_of(container)!r} is not iterable")

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        return self.joined([self.text(self.value(child, scope)) for child in node.nodes])

    def _dict(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for pair in node.items:
            key = self.value(pair.key, scope)
            self.budget.step(1 + self.budget.weight(key) // 8)
            made[key] = self.value(pair.value, scope)
        return self.budget.container(made)

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        return self.binary(
            node.operator, self.value(node.left, scope), self.value(node.right, scope)
        )

    def binary(self, op: str, left: Any, right: Any) -> Any:
        """Arithmetic, and what strings and lists do with + * and %."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            return self._arithmetic(op, left, right)
        if isinstance(left, Undefined) or isinstance(right, Undefined):
            undefined = left if isinstance(left, Undefined) else right
            if not (op == "%" and isinstance(left, str)):
                undefined._fail_with_undefined_error()  # pyright: ignore[reportPrivateUsage]
        if op == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.take(text_bytes(left) + text_bytes(right))
            return left + right
        if op == "+" and is_list(left) and type(left) is type(right):
            self.budget.take(64 + 8 * (len(left) + len(right)))
            return self.budget.made(cast("Any", left) + right)
        if op == "*" and isinstance(left, int) and not isinstance(left, float):
            left, right = right, left
        if op == "*" and isinstance(right, int) and (isinstance(left, str) or is_list(left)):
            count = max(int(right), 0)
            if isinstance(left, str):
                self.budget.take(text_bytes(left) * count)
                return left * count
            self.budget.take(64 + 8 * len(left) * count)
            return self.budget.made(left * count)
        if op == "%" and isinstance(left, str):
            return self.filtered("%", left, [right], {})
        raise TemplateError(
            f"unsupported operand types for {op}: {kind_of(left)!r} and {kind_of(right)!r}"
        )

    def _arithmetic(self, op: str, left: Any, right: Any) -> Any:
        if op == "+":
            return left + right
        if op == "-":
            return left - right
        if op == "/":
            return left / right
        if op == "//":
            return left // right
        if op == "%":
            return left % right
        whole = isinstance(left, int) and isinstance(right, int)
        if op == "*":
            if whole and left.bit_length() + right.bit_length() > MAX_INT_BITS:
                raise TemplateError(f"a product of more than {MAX_INT_BITS} bits")
            return left * right
        if whole and left.bit_length() * abs(right) > MAX_INT_BITS:
            raise TemplateError(f"a power of more than {MAX_INT_BITS} bits")
        result = left**right
        if isinstance(result, complex) or (isinstance(result, float) and math.isnan(result)):
            raise TemplateError("a power that is no number")
        return result
