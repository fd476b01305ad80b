"""What a chat template works with besides plain data: scopes, namespaces, functions, macros and `loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import Environment, nodes

from kbit.text.budget import Budget


class Scope:
    """Variables of a block; a name that is not here is looked up outside."""

    __slots__ = ("names", "outer")

    def __init__(self, outer: Scope | None, names: dict[str, Any]) -> None:
        self.outer = outer
        self.names = names


class Namespace:
    """The one thing a template may change."""

    __slots__ = ("attributes",)

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class Function:
    """A function, or a method of a value: called with evaluated arguments."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self.call = call


class Macro:
    """A macro with the scope it was written in."""

    __slots__ = ("body", "defaults", "name", "params", "scope", "uses")

    def __init__(self, name: str, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> None:
        self.name = name
        self.params = [param.name for param in node.args]
        self.defaults = node.defaults
        self.body = node.body
        self.scope = scope
        names = {name.name for child in node.body for name in child.find_all(nodes.Name)}
        self.uses = names & {"varargs", "kwargs", "caller"}


class Loop:
    """The variable `loop`; looks one item ahead only when asked."""

    def __init__(
        self,
        budget: Budget,
        items: Iterator[Any],
        known: Any,
        depth: int,
        recurse: Callable[[Any], str] | None,
    ) -> None:
        self._budget = budget
        self._items = items
        self._known = known
        self._ahead: list[Any] = []
        self.index0 = -1
        self.depth0 = depth
        self.recurse = recurse
        self.previous: list[Any] = []
        self.current: list[Any] = []
        self.seen: list[Any] = []

    def advance(self) -> bool:
        """Go to the next item; False at the end."""
        if not self._peek():
            return False
        self.previous = self.current
        self.current = [self._ahead.pop()]
        self.index0 += 1
        return True

    def _peek(self) -> bool:
        if not self._ahead:
            for item in self._items:
                self._ahead.append(item)
                break
        return bool(self._ahead)

    def length(self) -> int:
        """Number of items; reads the rest of an iterator."""
        if not hasattr(self._known, "__len__"):
            rest = self._ahead
            self._ahead = []
            for item in self._items:
                self._budget.take(48)
                rest.append(item)
            self._items = iter(rest)
            self._known = range(self.index0 + 1 + len(rest))
        return len(self._known)

    def attribute(self, name: str, environment: Environment) -> Any:
        """`loop.name`."""
        if name == "index0":
            return self.index0
        if name == "index":
            return self.index0 + 1
        if name == "first":
            return self.index0 == 0
        if name == "last":
            return not self._peek()
        if name == "length":
            return self.length()
        if name == "revindex":
            return self.length() - self.index0
        if name == "revindex0":
            return self.length() - self.index0 - 1
        if name == "depth0":
            return self.depth0
        if name == "depth":
            return self.depth0 + 1
        if name == "previtem":
            return (
                self.previous[0]
                if self.previous
                else environment.undefined("there is no previous item")
            )
        if name == "nextitem":
            return (
                self._ahead[0] if self._peek() else environment.undefined("there is no next item")
            )
        if name == "cycle":
            return Function("loop.cycle", lambda *args: args[self.index0 % len(args)])
        if name == "changed":
            return Function("loop.changed", self._changed)
        return environment.undefined(name=f"loop.{name}")

    def _changed(self, *values: Any) -> bool:
        new = self.seen != [values]
        self.seen = [values]
        return new
