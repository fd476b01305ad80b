"""The tokenizer: text to ids and back, whatever kind of file it came from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from kbit._core import ModelFormatError
from kbit.text import directory, gguf_vocab
from kbit.text.stream import StreamDecoder
from kbit.text.vocabulary import ControlToken, ControlTokens, Vocabulary, typed_failures

if TYPE_CHECKING:
    from kbit.text.chat import Chat, ChatPrompt

MAX_ID = 1 << 32
"""Ids that `tokenizers` takes are below it."""


class Tokenizer:
    """Text to token ids and back. Safe to share between threads.

    Attributes:
        bos_id: The token that begins a text; None where the model has none.
        unk_id: The token for what cannot be written; None where everything can.
        pad_id: The token that fills up batches; None where the model has none.
        eos_ids: Tokens that end an answer, from generation_config.json, config.json and the tokenizer itself.
        prefix: Ids that `encode` puts before a text (usually ``[bos_id]`` or nothing).
        suffix: Ids that `encode` puts after a text (nothing for a decoder).
        special_ids: Ids of control tokens.
        chat_templates: Sources of chat templates by name; the usual one is ``default``.
    """

    def __init__(self, vocabulary: Vocabulary, chat_templates: Mapping[str, str]) -> None:
        self._core = vocabulary.core
        self._inner = vocabulary.inner
        self._own_encode = vocabulary.encode
        self._names = vocabulary.names
        self._tokens = vocabulary.tokens
        self._controls = vocabulary.control
        self._control = ControlTokens(vocabulary.control)
        self._chat: Chat | None = None  # made for the first chat: jinja2 takes time to import
        self._lock = threading.Lock()
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self.pieces = vocabulary.pieces
        self.special_ids = frozenset(token.id for token in vocabulary.control)
        self.bos_id = vocabulary.bos_id
        self.unk_id = vocabulary.unk_id
        self.pad_id = vocabulary.pad_id
        self.eos_ids = tuple(vocabulary.eos_ids)
        self.prefix = list(vocabulary.prefix)
        self.suffix = list(vocabulary.suffix)
        self.chat_templates = dict(chat_templates)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """Source of the usual chat template; None where there is none."""
        return self.chat_templates.get("default")

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory: tokenizer.json, else tokenizer.model (SentencePiece).

        Raises:
            ModelFormatError: A file breaks its format, or there is no tokenizer.
            UnsupportedModelError: A kind of tokenizer that kbit does not know.
            OSError: A file cannot be read.
        """
        return cls(*directory.read(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Raises:
            ModelFormatError: Keys are missing, of the wrong type, or contradict each other.
            UnsupportedModelError: A kind of vocabulary or pre-tokenizer that kbit does not know.
        """
        templates: dict[str, str] = {}
        default = metadata.get("tokenizer.chat_template")
        if isinstance(default, str):
            templates["default"] = default
        elif default is not None:
            raise ModelFormatError(
                f"tokenizer.chat_template is a {type(default).__name__}, not a string"
            )
        names = metadata.get("tokenizer.chat_templates")
        for name in cast("list[Any]", names) if isinstance(names, list) else []:
            source = metadata.get(f"tokenizer.chat_template.{name}")
            if isinstance(source, str):
                templates.setdefault(str(name), source)
        return cls(gguf_vocab.read(metadata), templates)

    def encode(
        self, text: str, *, special: bool = False, add_bos: bool | None = None
    ) -> NDArray[np.uint32]:
        """Token ids of `text`, (n,) uint32.

        Args:
            text: Any str. Surrogate pairs become the character they mean, a lone surrogate becomes U+FFFD.
            special: Text such as ``<|im_start|>`` becomes the control token it names. Off by default: what a user
                writes is text.
            add_bos: Put `prefix` and `suffix` around the ids. None: as the model wants. A prefix that the text already
                wrote itself is never doubled.

        Raises:
            ModelFormatError: The tokenizer file holds a pattern that fails on this text.
        """
        ids = self._encode(well_formed(text), special)
        if add_bos or add_bos is None:
            prefix = self.prefix
            if add_bos and not prefix and self.bos_id is not None:
                prefix = [self.bos_id]
            if ids[: len(prefix)] != prefix:
                ids = prefix + ids
            if self.suffix and ids[-len(self.suffix) :] != self.suffix:
                ids = ids + self.suffix
        return np.asarray(ids, dtype=np.uint32)

    def encode_part(self, text: str, *, continues: bool) -> list[int]:
        """Ids of a stretch of text between control tokens, none of it parsed as one.

        Args:
            text: The stretch.
            continues: It does not begin the text, so no space is put before it where only the first gets one.
        """
        if self._inner is None or not continues:
            return self._encode(well_formed(text), special=False)
        return self._run(self._inner, well_formed(text), special=False)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None, add_generation_prompt: bool = True,
        template: str | None = None, **variables: Any,
    ) -> ChatPrompt:  # fmt: skip
        """A conversation as token ids, written by the model's chat template.

        Only control tokens that the template itself writes become control tokens: what stands in messages, tools,
        documents and variables is text. The ids are those of transformers' `apply_chat_template`, which adds no
        beginning-of-text token that the template did not write. A model without a template gets the plain format:
        ``User: hi``, a blank line, ``Assistant:``.

        Args:
            messages: ``{"role": "user", "content": "hi"}`` and so on.
            tools: JSON schemas of functions the model may call.
            documents: Texts the model may use.
            add_generation_prompt: End with what begins the assistant's answer.
            template: The name of one of `chat_templates`, or a source.
            variables: More names for the template.

        Raises:
            TemplateError: The template fails, refuses the conversation, or goes beyond its bounds.
            TypeError: An argument that is not JSON-like data.
        """
        if self._chat is None:
            from kbit.text.chat import Chat

            self._chat = Chat(self, self._controls)
        return self._chat.prompt(
            messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, template=template,
            **variables,
        )  # fmt: skip

    def special_texts(self) -> dict[str, str]:
        """Texts of named special tokens, as templates know them: ``bos_token`` and so on."""
        return dict(self._names)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`.

        Bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary (padded rows of an embedding) nothing.

        Args:
            ids: Token ids.
            special: Control tokens give their text instead of nothing.
        """
        stream = StreamDecoder(self, special=special)
        return "".join([stream.push(int(i)) for i in ids]) + stream.finish()

    def token_bytes(
        self, token_id: int, *, special: bool = True, first: bool = False
    ) -> bytes | None:
        """Bytes of one token; None for an id outside the vocabulary, or a control token unless `special`.

        Args:
            token_id: The token.
            special: Control tokens give their text.
            first: As the first token of a text, where some vocabularies drop a space.

        Raises:
            ValueError: A negative id.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        if token_id in self.special_ids and not special:
            return None
        known = self._bytes.get((token_id, first))
        if known is None:
            token = self.token(token_id)
            if token is None:
                return None
            known = (
                token.encode()
                if token_id in self.special_ids
                else self.pieces.of(token, first=first)
            )
            self._bytes[token_id, first] = known
        return known

    def token(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None outside it."""
        if 0 <= token_id < len(self._tokens):
            return self._tokens[token_id]
        # Not by `vocab_size`, which makes a dict of all tokens: 30 MB and a tenth of a second where there are 128 k.
        return self._core.id_to_token(token_id) if 0 <= token_id < MAX_ID else None

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it; None if it is none."""
        if token in self._tokens:
            return self._tokens.index(token)
        return self._core.token_to_id(token)

    def _encode(self, text: str, special: bool) -> list[int]:
        if self._own_encode is None:
            return self._run(self._core, text, special)
        ids: list[int] = []
        with typed_failures(f"the tokenizer fails on a text of {len(text)} characters"):
            for part in self._control.split(text) if special else [text]:
                ids += [part.id] if isinstance(part, ControlToken) else self._own_encode(part)
        return ids

    def _run(self, core: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
        # A pattern that takes too long is one such failure.
        with self._lock, typed_failures(f"the tokenizer fails on a text of {len(text)} characters"):
            core.encode_special_tokens = not special  # the switch belongs to the shared object
            return core.encode(text, add_special_tokens=False).ids


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
