"""Text: tokenizers from every file that carries one, streaming decoding, chat templates."""

from kbit.text.kinds import TemplateError
from kbit.text.stream import StreamDecoder
from kbit.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "TemplateError", "Tokenizer"]
