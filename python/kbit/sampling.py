"""How tokens are chosen, and what a finished generation looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, NamedTuple

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Immutable; every field is checked when it is made.

    Attributes:
        max_new_tokens: Tokens to generate at most, at least 1.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Keeps the k most likely tokens; 0 keeps all.
        top_p: Keeps the most likely tokens that together reach this probability, in (0, 1].
        min_p: Drops tokens less likely than this fraction of the most likely one, in [0, 1).
        repetition_penalty: Divides positive, multiplies negative logits of tokens that occurred; 1 does nothing.
        seed: 64-bit seed of the draws; None draws one.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Ids that end the text besides the model's own.
        ignore_eos: True goes on past the model's end of text.
        logprobs: Report log-probabilities, and of this many most likely alternatives, 0..20; None reports none.
        n: Completions per prompt; the seed of completion i is `seed + i`.

    Raises:
        ValueError: A field is out of range.
        TypeError: A field has the wrong type, or there is no such field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        ids = tuple(_integer("stop_token_ids", i, 0, 2**32 - 1) for i in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        _integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("n", self.n, 1, 1024)
        _number("temperature", self.temperature, 0.0, 1e6)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0, high_open=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, low_open=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ignore_eos = {self.ignore_eos!r} is not a bool")

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked like the original."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in changes:
            if name not in known:
                raise TypeError(f"unknown sampling argument {name!r}; there are {', '.join(known)}")
        return SamplingParams(**(known | changes))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Defaults of a checkpoint's `generation_config.json`; its temperature counts only under `do_sample`."""
        chosen: dict[str, Any] = {}
        names = ["repetition_penalty", "max_new_tokens"]
        if config.get("do_sample"):
            chosen["temperature"] = 1.0
            names += ["temperature", "top_k", "top_p", "min_p"]
        for name in names:
            if config.get(name) is not None:
                chosen[name] = config[name]
        return cls(**chosen)


class TokenLogprob(NamedTuple):
    """The natural log-probability of a generated token, before sampling changed the logits."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely ids with theirs, as many as `SamplingParams.logprobs`."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a completion went."""

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    """Until the first token."""
    decode_seconds: float
    """From the first token to the last."""

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 when there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Rate at which the prompt was read."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation. `str()` of it is its text."""

    text: str
    """Without the prompt, the end-of-text token and the stop string."""
    token_ids: list[int]
    """All generated ids, those of the end included."""
    finish_reason: str
    """`stop` (end of text or a stop string), `length`, `context` or `cancelled`."""
    timings: Timings = field(compare=False)
    """Not part of equality: the same text took another time."""
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text


def _strings(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    for s in strings:
        if not isinstance(s, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name} holds {s!r}, which is not a str")
        if not s:
            raise ValueError(f"{name} holds an empty string, which would end every text at once")
    return strings


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} = {value!r} is not an int")
    number = int(value)  # pyright: ignore[reportArgumentType]
    if not low <= number <= high:
        raise ValueError(f"{name} = {number} is not in {low}..{high}")
    return number


def _number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} = {value!r} is not a number")
    number = float(value)  # pyright: ignore[reportArgumentType]
    inside = (low < number if low_open else low <= number) and (
        number < high if high_open else number <= high
    )
    if not (isfinite(number) and inside):
        brackets = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name} = {number:g} is not in {brackets}")
