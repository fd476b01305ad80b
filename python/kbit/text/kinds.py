"""What reading a tokenizer shares with chat templates, without jinja2: a model loads without it."""

from __future__ import annotations

from typing import Any, TypeGuard

from kbit._core import ModelFormatError

MAX_SOURCE = 1 << 20
"""Longest chat template, in characters."""


class TemplateError(ModelFormatError):
    """A chat template that is wrong, goes beyond its limits, or refuses the conversation."""


def is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether a value is a list or tuple."""
    return isinstance(value, list | tuple)


def is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    """Whether a value is a dict."""
    return isinstance(value, dict)
