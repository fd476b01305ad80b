"""Conversations to token ids.

A template writes control tokens as text, and so may a user. What the user wrote stays text: its
control tokens are marked before the template sees them, which keeps them apart from its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kbit._core import ModelFormatError
from kbit.text.kinds import is_dict, is_list
from kbit.text.template import PLAIN, ChatTemplate
from kbit.text.vocabulary import ControlToken, ControlTokens

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer

PLAIN_STOP = ("\nUser:",)
"""Where an answer in the plain format ends."""
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Noncharacters: text for interchange holds none of them."""


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it.

    Attributes:
        ids: (n,) token ids.
        text: What the template wrote.
        stop: Texts that end the answer, besides the model's own tokens: those of the plain format.
    """

    ids: NDArray[np.uint32]
    text: str
    stop: tuple[str, ...]


class Chat:
    """Templates and control tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, control: Sequence[ControlToken]) -> None:
        self._tokenizer = tokenizer
        # A token of one character has no inside where a mark could stand.
        self._control = ControlTokens(token for token in control if len(token.text) > 1)
        self._parsed: dict[str, ChatTemplate] = {}

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None, add_generation_prompt: bool = True,
        template: str | None = None, **variables: Any,
    ) -> ChatPrompt:  # fmt: skip
        """See `Tokenizer.chat`."""
        source = self._source(template, tools)
        parsed = self._parsed.get(source)
        if parsed is None:
            parsed = self._parsed[source] = ChatTemplate(source)
        mark, pattern = self._mark([messages, tools, documents, variables]), self._control.pattern

        def guard(text: str) -> str:
            while mark and pattern.search(text):
                text = pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)
            return text

        text = parsed.render(
            messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, guard=guard,
            **(self._tokenizer.special_texts() | variables),
        )  # fmt: skip
        plain = source == PLAIN
        if mark and mark in text:
            ids = self._encode_marked(text, mark)
            if plain:
                ids = [*self._tokenizer.prefix, *ids]
            return ChatPrompt(
                np.asarray(ids, dtype=np.uint32),
                text.replace(mark, ""),
                PLAIN_STOP if plain else (),
            )
        # A template writes its own beginning-of-text token; the plain format leaves it to the tokenizer.
        encoded = self._tokenizer.encode(text, special=True, add_bos=None if plain else False)
        return ChatPrompt(encoded, text, PLAIN_STOP if plain else ())

    def _source(self, template: str | None, tools: Sequence[Any] | None) -> str:
        templates = self._tokenizer.chat_templates
        if template is not None:
            return templates.get(template, template)
        if tools is not None and "tool_use" in templates:
            return templates["tool_use"]
        if templates and "default" not in templates:
            raise ModelFormatError(
                f"the model has chat templates {sorted(templates)} and no default: name one"
            )
        return templates.get("default", PLAIN)

    def _mark(self, inputs: Any) -> str:
        """A character that is in none of the inputs; empty if no text in them holds a control token."""
        free = set(_MARKS)
        found = False
        stack = [inputs]
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                found = found or self._control.pattern.search(value) is not None
                free.difference_update(value)
            elif is_dict(value):
                stack.extend([*value.keys(), *value.values()])
            elif is_list(value):
                stack.extend(value)
        if found and not free:
            raise ValueError(
                "the conversation holds control tokens and every noncharacter from U+FDD0 to U+FDEF"
            )
        return min(free) if found else ""

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a text in which only unmarked control tokens are control tokens."""
        ids: list[int] = []
        for part in self._control.split(text):
            if isinstance(part, ControlToken):
                ids.append(part.id)
            else:
                ids += self._tokenizer.encode_part(part.replace(mark, ""), continues=bool(ids))
        return ids
