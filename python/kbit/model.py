"""A loaded model: what it can do, in terms of text and token ids."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kbit import checkpoint, perplexity
from kbit._core import Engine, Weight
from kbit.generation import AsyncStream, Stream, finish_all
from kbit.sampling import Completion, SamplingParams
from kbit.text import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from kbit.checkpoint import Source
    from kbit.loading import Options
    from kbit.spec import ModelSpec

Prompt = str | ArrayLike
"""A text, or a 1-D array of token ids."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with a `role` and a `content`."""


class Forward(NamedTuple):
    """What one pass over n ids gives, float32."""

    logits: NDArray[np.float32]
    """(n, vocab)."""
    hidden_states: list[NDArray[np.float32]]
    """The embedding, then what each layer leaves, the last one normalised: (n, hidden) each. Empty unless asked for."""
    attentions: list[NDArray[np.float32]]
    """Attention weights of each layer, (heads, n, n). Empty unless asked for."""


class Model:
    """A language model, made by `kbit.load`.

    Every method may be called from many threads at once: concurrent requests run in one batch and give the same
    tokens as alone. `close()`, or leaving a `with` block, frees the memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Weight],
        engine: Engine,
        *,
        tokenizer: Tokenizer | None,
        config: Mapping[str, Any],
        defaults: SamplingParams,
        eos_token_ids: Sequence[int],
        source: Source,
        options: Options,
    ) -> None:
        self.spec = spec
        """What is computed, as data."""
        self.config: dict[str, Any] = dict(config)
        """`config.json`, or the key-values of a GGUF file under its names."""
        self.defaults = defaults
        """Sampling when nothing is said, from the checkpoint's `generation_config.json`."""
        self.engine = engine
        """The engine underneath."""
        self.weights: dict[str, Weight] = dict(weights)
        """By canonical name (docs/adding.md)."""
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        """Ids that end a text."""
        self._nbytes = sum(weight.nbytes for weight in weights.values())
        self._num_parameters = sum(prod(weight.shape) for weight in weights.values())
        self._tokenizer = tokenizer
        self._source = source
        self._options = options

    # What it is

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint.

        Raises:
            ValueError: It has none; the model then works on ids.
        """
        if self._tokenizer is None:
            raise ValueError(
                f"{self._options.name}: there is no tokenizer beside the weights, so texts cannot be read "
                "or written; pass token ids, and read token_ids"
            )
        return self._tokenizer

    @property
    def source(self) -> Source:
        """The files it was loaded from."""
        return self._source

    @property
    def name(self) -> str:
        """What it was loaded from."""
        return self._options.name

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self._nbytes

    @property
    def num_parameters(self) -> int:
        """Weights of all tensors."""
        return self._num_parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all tensors, every constant and all padding counted."""
        return 8.0 * self.nbytes / self.num_parameters

    @property
    def context(self) -> int:
        """Positions that a prompt and its continuation may have."""
        return self.engine.context

    def stats(self) -> dict[str, float]:
        """Counters of the engine: tokens, seconds in prefill and decode, bytes of cache, steps."""
        return self.engine.stats()

    def __repr__(self) -> str:
        return (
            f"<kbit.Model {self.name}: {len(self.spec.layers)} layers of {self.spec.hidden_size}, "
            f"{self.num_parameters / 1e6:,.1f} M weights at {self.bits_per_weight:.2f} bits = "
            f"{self.nbytes / 1e6:,.1f} MB, context {self.context}, {self.engine.device}, "
            f"{self.engine.threads} threads>"
        )

    # Text to ids and back

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.uint32]:
        """(n,) token ids of a text, with the beginning-of-text token if the model wants one."""
        return self.tokenizer.encode(text, add_bos=None if add_special_tokens else False)

    def detokenize(self, ids: ArrayLike) -> str:
        """The text of token ids; control tokens give nothing."""
        return self.tokenizer.decode(self._ids(ids).tolist())

    def _ids(self, prompt: Prompt) -> NDArray[np.uint32]:
        """(n,) ids of a prompt, checked."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        ids = np.asarray(prompt)
        if ids.ndim != 1:
            raise ValueError(
                f"token ids have the shape {ids.shape}; a prompt is a str or a 1-D array of ids"
            )
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(
                f"token ids have the dtype {ids.dtype}; a prompt is a str or a 1-D array of ids"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= self.spec.vocab_size):
            raise ValueError(
                f"token ids go from {ids.min()} to {ids.max()}; the vocabulary has {self.spec.vocab_size}"
            )
        return ids.astype(np.uint32)

    # Generation

    @overload
    def generate(
        self, prompt: str | NDArray[Any], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[NDArray[Any]],
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Any, params: SamplingParams | None = None, **sampling: Any
    ) -> Any: ...
    def generate(self, prompt: Any, params: SamplingParams | None = None, **sampling: Any) -> Any:
        """Continues a prompt, or several in one batch.

        Args:
            prompt: A text, a 1-D array of token ids, or a list of texts or arrays.
            params: How to sample; None takes `defaults`.
            **sampling: Fields of `SamplingParams` that replace those of `params`.

        Returns:
            A `Completion`; a list of them for a list of prompts. With `n > 1` there are n, in a list, in its place.

        Raises:
            ValueError: A field out of range, an empty prompt, or an id outside the vocabulary.
            TypeError: No such field.
            ContextOverflowError: A prompt that is longer than the context.
        """
        params = self._params(params, sampling)
        several = _is_batch(prompt)
        prompts = [self._ids(one) for one in (prompt if several else [prompt])]
        done = finish_all(
            partial(self._submit, ids, draw) for ids in prompts for draw in _draws(params)
        )
        groups: list[Any] = [done[i : i + params.n] for i in range(0, len(done), params.n)]
        if params.n == 1:
            groups = done
        return groups if several else groups[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any
    ) -> Stream:
        """Continues a prompt piece by piece: `for piece in model.stream("Once upon a time")`.

        The pieces joined are the `text` of `generate` with the same arguments; each is whole characters. The stream
        carries `text`, `token_ids`, `logprobs` and `finish_reason`. Arguments and errors are those of `generate`.
        """
        params = self._params(params, sampling)
        if params.n != 1:
            raise ValueError(f"n = {params.n}: a stream has one completion")
        return self._submit(self._ids(prompt), params)

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Stream: ...
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Completion | Stream:
        """Answers a conversation, written by the chat template of the model.

        A model without a template reads the plain format: `User: hi`, a blank line, `Assistant:`; its answer ends
        before the next `User:`. Control tokens in messages are text.

        Args:
            messages: `{"role": "user", "content": "hi"}` and so on.
            params: How to sample; None takes `defaults`.
            stream: True returns a `Stream`.
            tools: JSON schemas of functions, for the template.
            documents: Texts, for the template.
            template: Name of one of the model's templates, or a source.
            variables: More names for the template, such as `{"enable_thinking": False}`.
            **sampling: Fields of `SamplingParams` that replace those of `params`.

        Raises:
            TemplateError: The template fails, refuses the conversation, or goes beyond its bounds.
            ValueError: As for `generate`.
        """
        prompt = self.tokenizer.chat(
            messages, tools=tools, documents=documents, template=template, **(variables or {})
        )
        params = self._params(params, sampling)
        params = params.replace(stop=(*params.stop, *prompt.stop))
        return self.stream(prompt.ids, params) if stream else self.generate(prompt.ids, params)

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any
    ) -> AsyncStream:
        """As `stream`, for asyncio: `async for piece in model.astream(...)`."""
        return AsyncStream(lambda: self.stream(prompt, params, **sampling))

    async def agenerate(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any
    ) -> Completion:
        """As `generate` of one prompt, for asyncio; cancelling the task ends it."""
        return await self.astream(prompt, params, **sampling).result()

    async def achat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """As `chat`, for asyncio; cancelling the task ends it."""
        return await AsyncStream(
            lambda: self.chat(messages, params, stream=True, **options)
        ).result()

    def _params(self, params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
        return (self.defaults if params is None else params).replace(**changes)

    def _submit(self, ids: NDArray[np.uint32], params: SamplingParams) -> Stream:
        if not len(ids):
            raise ValueError("the prompt is empty: there is nothing to continue")
        eos = () if params.ignore_eos else self.eos_token_ids
        eos = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop = {params.stop!r}: there is no tokenizer that knows texts")
        decoder = StreamDecoder(self._tokenizer, continues=True) if self._tokenizer else None
        request = self.engine.submit(
            ids,
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            eos=eos,
            logprobs=params.logprobs,
        )
        return Stream(request, decoder, params, eos, len(ids))

    # Measuring

    @overload
    def score(self, prompt: Prompt, continuation: Prompt) -> NDArray[np.float32]: ...
    @overload
    def score(
        self, prompt: Sequence[str], continuation: Sequence[str]
    ) -> list[NDArray[np.float32]]: ...
    def score(self, prompt: Any, continuation: Any) -> Any:
        """Natural log-probabilities of the tokens of `continuation` after `prompt`.

        Two texts are tokenised as one, and the tokens past those of `prompt` alone count; two arrays of ids are joined.

        Returns:
            (m,) float32, one for each token; a list of such arrays for two lists.
        """
        if _is_batch(prompt):
            if len(prompt) != len(continuation):
                raise ValueError(f"{len(prompt)} prompts and {len(continuation)} continuations")
            return [self.score(p, c) for p, c in zip(prompt, continuation, strict=True)]
        if isinstance(prompt, str) and isinstance(continuation, str):
            start = len(self._ids(prompt))
            ids = self._ids(prompt + continuation)
        else:
            first, second = self._ids(prompt), self._ids(continuation)
            start, ids = len(first), np.concatenate([first, second])
        if not 0 < start < len(ids):
            raise ValueError(
                f"the prompt has {start} tokens and the continuation {len(ids) - start}: each needs one at least"
            )
        return self.engine.score(ids, start)

    def perplexity(self, text: Prompt, *, window: int | None = None) -> float:
        """The exponential of the mean negative log-likelihood of a text, in windows of `window` tokens, no overlap.

        Args:
            text: A text, or its token ids.
            window: Tokens read at once; None: 256, or the context if that is shorter.

        Raises:
            ValueError: Fewer than two tokens, or a window under 2.
            ContextOverflowError: A window longer than the context.
        """
        ids = (
            self.tokenize(text, add_special_tokens=False)
            if isinstance(text, str)
            else self._ids(text)
        )
        return perplexity.perplexity(self, ids, window)

    @overload
    def forward(self, ids: Prompt) -> NDArray[np.float32]: ...
    @overload
    def forward(
        self, ids: Prompt, *, hidden_states: Literal[True], attentions: bool = False
    ) -> Forward: ...
    @overload
    def forward(
        self, ids: Prompt, *, hidden_states: bool = False, attentions: Literal[True]
    ) -> Forward: ...
    def forward(
        self, ids: Prompt, *, hidden_states: bool = False, attentions: bool = False
    ) -> NDArray[np.float32] | Forward:
        """One pass over a text or ids from an empty cache.

        Returns:
            (n, vocab) float32 logits; a `Forward` if hidden states or attention weights are asked for.
        """
        out = self.engine.forward(
            self._ids(ids), hidden_states=hidden_states, attentions=attentions
        )
        if not (hidden_states or attentions):
            return out["logits"]
        return Forward(out["logits"], out.get("hidden_states", []), out.get("attentions", []))

    # Keeping

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a directory that `kbit.load` reads without work: weights as they are, config, tokenizer, template.

        Raises:
            OSError: It cannot be written.
            ValueError: The model is closed.
        """
        if not self.weights:
            raise ValueError(f"{self.name} is closed: there are no weights to save")
        metadata = {
            "bits": self._options.bits,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "source": Path(self.name).name,
        }
        checkpoint.save(
            Path(directory), self.spec, self.weights, self.config, metadata, self._source
        )

    def close(self) -> None:
        """End everything under way and free the memory. Twice is fine."""
        self.engine.close()
        self.weights.clear()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        from kbit.loading import load_options

        return load_options, (self._options,)


def _is_batch(prompt: Any) -> bool:
    """Whether `prompt` is several prompts: a list of texts or of ids, or a 2-D array."""
    if isinstance(prompt, list | tuple):
        return any(not isinstance(one, int | np.integer) for one in cast("Sequence[Any]", prompt))
    return isinstance(prompt, np.ndarray) and prompt.ndim == 2


def _draws(params: SamplingParams) -> list[SamplingParams]:
    """`params` once for each of its n completions, each with a seed of its own."""
    if params.n == 1:
        return [params]
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return [params.replace(n=1, seed=(seed + i) % 2**64) for i in range(params.n)]
