"""How well a model predicts a text, and what quantising costs: perplexity and Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.progress import Progress

if TYPE_CHECKING:
    from kbit.model import Model

WINDOW = 256
"""Tokens read at once, where every context holds them."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one model does on a text."""

    bits_per_weight: float
    """All weights, every constant and all padding counted."""
    nbytes: int
    """Of all weights."""
    perplexity: float
    """exp of the mean negative log-likelihood of the scored tokens."""
    kl: float | None
    """Mean over the scored positions of KL(reference || model) in nats; None for the reference itself."""
    tokens: int
    """Tokens scored."""


def windows(ids: NDArray[np.uint32], window: int) -> Iterator[NDArray[np.uint32]]:
    """Consecutive pieces of `window` ids without overlap; a last piece needs two ids to score one."""
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) > 1:
            yield piece


def default_window(*models: Model) -> int:
    """`WINDOW` tokens, or as many as the shortest context holds."""
    return min(WINDOW, *(model.context for model in models))


def perplexity(model: Model, ids: NDArray[np.uint32], window: int | None = None) -> float:
    """The exponential of the mean negative log-likelihood of each token given those before it in its window.

    Args:
        model: What predicts.
        ids: (n,) token ids.
        window: Tokens read at once; None: `default_window`.

    Raises:
        ValueError: Fewer than two ids, or a window under 2.
        ContextOverflowError: A window longer than the context.
    """
    window = default_window(model) if window is None else window
    _check(ids, window)
    total, count = 0.0, 0
    with Progress("measuring", len(ids)) as progress:
        for piece in windows(ids, window):
            total -= float(model.engine.score(piece).sum(dtype=np.float64))
            count += len(piece) - 1
            progress.advance(len(piece))
    return exp(total / count)


def compare(
    reference: Model, models: Sequence[Model], ids: NDArray[np.uint32], window: int | None = None
) -> list[Measurement]:
    """Measures `reference` and then `models` on the same windows; all of them stay in memory.

    Args:
        reference: What others are compared with.
        models: The others.
        ids: (n,) token ids.
        window: Tokens read at once; None: `default_window` of all.

    Raises:
        ValueError: Fewer than two ids, a window under 2, or models whose vocabularies differ in size.
        ContextOverflowError: A window longer than a context.
    """
    everyone = [reference, *models]
    window = default_window(*everyone) if window is None else window
    _check(ids, window)
    for model in models:
        if (n := model.spec.vocab_size) != reference.spec.vocab_size:
            raise ValueError(
                f"{reference.name} has {reference.spec.vocab_size} tokens and {model.name} {n}: "
                "only models over the same vocabulary can be compared"
            )
    nll = np.zeros(len(everyone))
    kl = np.zeros(len(everyone))
    count = 0
    with Progress("measuring", len(ids) * len(everyone)) as progress:
        for piece in windows(ids, window):
            rows, targets = np.arange(len(piece) - 1), piece[1:]
            expected = np.empty(0)
            for i, model in enumerate(everyone):
                logp = log_softmax(model.forward(piece)[:-1])
                nll[i] -= logp[rows, targets].sum()
                if i == 0:
                    expected = logp
                else:
                    kl[i] += np.sum(np.exp(expected) * (expected - logp))
                progress.advance(len(piece))
            count += len(piece) - 1
    return [
        Measurement(
            model.bits_per_weight,
            model.nbytes,
            exp(nll[i] / count),
            None if i == 0 else float(kl[i] / count),
            count,
        )
        for i, model in enumerate(everyone)
    ]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, vocab) log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _check(ids: NDArray[np.uint32], window: int) -> None:
    if window < 2:
        raise ValueError(f"window = {window} is too short: scoring a token needs one before it")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; scoring needs at least 2")
