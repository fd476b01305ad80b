"""Merge lists for vocabularies that rank whole tokens instead of merges."""

from __future__ import annotations

from collections.abc import Mapping

from kbit._core import ModelFormatError

MAX_WORK = 1 << 30
"""Most characters copied while all splits of all tokens are tried."""


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, the best third first.

    SentencePiece (and tiktoken) join the adjacent pair whose whole has the highest score, however the whole is split;
    `tokenizers` ranks pairs. So every split of a token into two tokens becomes a merge, ordered by the token's score.

    Args:
        scores: Score of every token that may take part.

    Raises:
        ModelFormatError: Tokens too long to try all splits.
    """
    if sum(len(token) ** 2 for token in scores) > MAX_WORK:
        raise ModelFormatError(
            f"tokenizer: {len(scores)} tokens of up to {max(map(len, scores))} characters have too many "
            "splits to build merges"
        )
    merges: list[tuple[str, str]] = []
    for token in sorted(scores, key=scores.__getitem__, reverse=True):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges
