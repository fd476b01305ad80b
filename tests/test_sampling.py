"""SamplingParams: what is accepted, and how the rest is refused."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit import SamplingParams, Timings

RANGES = {
    "max_new_tokens": ([1, 2**31 - 1], [0, -1, 2**31]),
    "temperature": ([0, 0.0, 1.5, 1e6], [-0.1, float("nan"), float("inf"), 2e6]),
    "top_k": ([0, 1, 2**31 - 1], [-1, 2**31]),
    "top_p": ([1e-9, 1.0], [0.0, 1.0000001, -1.0, float("nan")]),
    "min_p": ([0.0, 0.999], [1.0, -1e-9, float("nan")]),
    "repetition_penalty": ([1e-6, 1.0, 2.0], [0.0, -1.0, float("inf")]),
    "seed": ([None, 0, 2**64 - 1], [-1, 2**64]),
    "logprobs": ([None, 0, 20], [-1, 21]),
    "n": ([1, 1024], [0, 1025]),
    "stop_token_ids": ([(), [0, 7]], [[-1], [2**32]]),
    "stop": ([(), "a", ["a", "b"]], ["", ["a", ""]]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, (good, _) in RANGES.items() for v in good]
)
def test_accepts(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == (value if not name.startswith("stop") else tuple(value))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, bad) in RANGES.items() for v in bad])
def test_refuses_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    if name not in ("stop", "stop_token_ids"):
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert f"{name} = {shown} is not in" in str(caught.value)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "n", "temperature", "top_p"])
@pytest.mark.parametrize("value", ["1", [1], True, 1j])
def test_refuses_types(name, value):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


def test_floats_are_no_integers():
    with pytest.raises(TypeError, match=re.escape("top_k = 1.0 is not an int")):
        SamplingParams(top_k=1.0)


def test_unknown_argument_names_the_known_ones():
    with pytest.raises(TypeError, match=r"'max_tokens'.*max_new_tokens"):
        SamplingParams().replace(max_tokens=3)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # pyright: ignore


@given(st.integers(1, 100), st.floats(0, 10), st.text(min_size=1))
def test_replace_keeps_the_rest(n, temperature, stop):
    params = SamplingParams(max_new_tokens=n, temperature=temperature, stop=stop)
    assert params.replace() == params
    changed = params.replace(top_k=5)
    assert changed.replace(top_k=0) == params
    assert changed.stop == (stop,)


def test_generation_config_counts_only_under_do_sample():
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    assert SamplingParams.from_generation_config(config) == SamplingParams(repetition_penalty=1.1)
    sampled = SamplingParams.from_generation_config(config | {"do_sample": True})
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.95, 20)
    assert SamplingParams.from_generation_config({"do_sample": True}).temperature == 1.0


def test_rates():
    t = Timings(prompt_tokens=10, new_tokens=5, prompt_seconds=0.5, decode_seconds=2.0)
    assert t.decode_tokens_per_second == 2.0
    assert t.prompt_tokens_per_second == 20.0
    assert Timings(1, 1, 0.0, 0.0).decode_tokens_per_second == 0.0
