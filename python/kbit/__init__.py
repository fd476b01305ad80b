"""k-bit inference for language models, k = 2..8.

>>> import kbit
>>> model = kbit.load()  # the bundled story teller; or a directory, a .gguf, a hub id, with bits=2..8
>>> text = model.generate("Once upon a time", max_new_tokens=8).text
"""

from kbit._core import (
    ContextOverflowError,
    DeviceError,
    GenerationCancelled,
    GrammarError,
    KbitError,
    MemoryBudgetError,
    ModelFormatError,
    UnsupportedModelError,
    build_info,
    isa,
    isas,
)
from kbit._core import Weight as KTensor
from kbit.generation import AsyncStream, Stream
from kbit.loading import load
from kbit.model import Forward, Model
from kbit.quantizing import BitsPlan, quantize
from kbit.sampling import Completion, SamplingParams, Timings, TokenLogprob
from kbit.text import TemplateError, Tokenizer

__version__ = build_info()["version"]

__all__ = [
    "AsyncStream",
    "BitsPlan",
    "Completion",
    "ContextOverflowError",
    "DeviceError",
    "Forward",
    "GenerationCancelled",
    "GrammarError",
    "KTensor",
    "KbitError",
    "MemoryBudgetError",
    "Model",
    "ModelFormatError",
    "SamplingParams",
    "Stream",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedModelError",
    "__version__",
    "build_info",
    "isa",
    "isas",
    "load",
    "quantize",
]
