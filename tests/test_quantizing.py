"""Which weight gets how many bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbit
from kbit.quantizing import BitsPlan, Storage

MATRIX = (64, 32)


def storage(bits, canonical, *sources, shape=MATRIX, dtype=None, tied=False):
    return BitsPlan(bits, dtype).storage(canonical, sources, shape, tied=tied)


@pytest.mark.parametrize(("k", "head"), [(2, 4), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 8)])
def test_a_number_spares_head_embedding_and_vectors(k, head):
    assert storage(k, "layers.0.attn.q.weight") == Storage(bits=k)
    assert storage(k, "embed.weight") == storage(k, "head.weight") == Storage(bits=head)
    for name in ("final_norm.weight", "layers.3.attn.q.bias"):
        assert storage(k, name, shape=(64,)) == Storage(dtype="f32")
    for name in ("layers.3.mlp.router.weight", "embed.positions.weight"):
        assert storage(k, name) == Storage(dtype="f32")


def test_star_is_the_plain_number():
    for name in ("layers.0.mlp.up.weight", "embed.weight", "final_norm.weight"):
        assert storage({"*": 3}, name) == storage(3, name)


def test_none_keeps_what_is_stored():
    assert storage(None, "layers.0.mlp.up.weight") == Storage()
    assert storage({"lm_head": 8}, "layers.0.mlp.up.weight") == Storage()
    assert storage(None, "layers.0.mlp.up.weight", dtype="bf16") == Storage(dtype="bf16")


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_pattern_wins_in_any_order(order):
    bits = dict([("*", 4), ("mlp", 3), ("layers.0.mlp", 5), ("mlp.down", 6)][::order])
    assert storage(bits, "layers.0.attn.q.weight").bits == 4
    assert storage(bits, "layers.1.mlp.up.weight").bits == 3
    assert storage(bits, "layers.0.mlp.up.weight").bits == 5
    assert storage(bits, "layers.0.mlp.down.weight").bits == 5
    assert storage(bits, "layers.1.mlp.down.weight").bits == 6


def test_patterns_fit_whole_parts_of_either_name():
    source = "model.layers.1.self_attn.q_proj.weight"
    for pattern in ("q_proj", "layers.1", "attn.q", "self_attn.*", source, "layers.?.attn.q"):
        assert storage({pattern: 2}, "layers.1.attn.q.weight", source).bits == 2, pattern
    for pattern in ("proj", "layers.10", "layers", "ayers.1"):
        fits = storage({pattern: 2}, "layers.10.attn.q.weight").bits == 2
        assert fits == (pattern in ("layers.10", "layers")), pattern


def test_a_tied_embedding_answers_to_the_heads_names():
    bits = {"lm_head": 8, "*": 4}
    assert storage(bits, "embed.weight", tied=True).bits == 8
    assert storage(bits, "embed.weight", tied=False).bits == 5


def test_vectors_by_name():
    assert storage({"final_norm": "bf16"}, "final_norm.weight", shape=(8,)).dtype == "bf16"


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 16])
def test_widths_out_of_range(bits):
    for given_bits in (bits, {"lm_head": bits}):
        with pytest.raises(ValueError, match=rf"bits = {bits} is not in 2\.\.8"):
            BitsPlan(given_bits)


@pytest.mark.parametrize("bits", ["4", 4.0, True, [4]])
def test_widths_of_wrong_type(bits):
    with pytest.raises((TypeError, ValueError), match="bits"):
        BitsPlan({"*": bits})


def test_unused_patterns_are_named():
    plan = BitsPlan({"lm_haed": 8, "*": 4})
    plan.storage("head.weight", ["lm_head.weight"], MATRIX)
    with pytest.raises(ValueError, match=r"'lm_haed'.*head\.weight"):
        plan.check_used(["head.weight"])


def test_bits_and_dtype_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        BitsPlan(4, "f32")
    with pytest.raises(ValueError, match="int4"):
        BitsPlan(None, "int4")


@given(st.integers(2, 8), st.text(alphabet="abc.*?", min_size=1).filter(lambda p: p != "*"))
def test_any_pattern_is_used_or_reported(k, pattern):
    plan = BitsPlan({pattern: k})
    name = "a.b.c"
    fits = plan.storage(name, [], MATRIX) == Storage(bits=k)
    try:
        plan.check_used([name])
    except ValueError:
        assert not fits
    else:
        assert fits


def test_ktensor_is_exported():
    assert kbit.KTensor is kbit._core.Weight
