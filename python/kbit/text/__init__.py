"""Text: tokenizers from every file that carries one, streaming decoding, chat templates."""

from kbit.text.budget import TemplateError
from kbit.text.stream import StreamDecoder
from kbit.text.template import ChatTemplate
from kbit.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "TemplateError", "Tokenizer"]
