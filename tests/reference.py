"""The definition of k-bit matrices in NumPy, from docs/formats.md and docs/numerics.md. Slow and obvious.

Nothing here comes from the Rust code, and nothing of kbit is imported: a matrix is its header (what
`Weight.describe()` says) and its bytes (`Weight.raw()`). All floats are float32, every operation
rounds once, and the order of additions is the one of the document.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

F32 = np.float32
ROWS, CHUNK, SUPER = 16, 64, 256


# ---------------------------------------------------------------------------------- bit planes

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def to_bits(values, width):
    """(..., n) integers -> (..., n, width) bits, lowest first."""
    return np.asarray(values)[..., None] >> np.arange(width) & 1


def from_bits(bits):
    """The inverse of `to_bits`."""
    return (bits.astype(np.int64) << np.arange(bits.shape[-1])).sum(-1)


def pack(codes, bits):
    """Codes (rows, inputs), multiples of 16 and 64 -> (panels, chunks, bits * 128) bytes."""
    rows, inputs = codes.shape
    panels = codes.reshape(rows // ROWS, ROWS, inputs // CHUNK, 16, 4)
    # (panel, chunk, vector of 4 inputs, byte = row * 4 + input)
    vectors = panels.transpose(0, 2, 3, 1, 4).reshape(rows // ROWS, inputs // CHUNK, 16, 64)
    parts, shift = [], 0
    for width in PLANES[bits]:
        per = 8 // width
        piece = vectors >> shift & ((1 << width) - 1)
        # Vector g is at bit width * (g % per) of byte vector g / per.
        places = to_bits(piece.reshape(*piece.shape[:2], 16 // per, per, 64), width)
        in_byte = places.transpose(0, 1, 2, 4, 3, 5).reshape(*piece.shape[:2], 16 // per, 64, 8)
        parts.append(from_bits(in_byte).reshape(*piece.shape[:2], -1))
        shift += width
    return np.concatenate(parts, -1).astype(np.uint8)


def unpack(packed, bits):
    """The inverse of `pack`."""
    panels, chunks = packed.shape[:2]
    vectors = np.zeros((panels, chunks, 16, 64), np.int64)
    at = shift = 0
    for width in PLANES[bits]:
        per = 8 // width
        plane = packed[..., at : at + 128 * width].reshape(panels, chunks, 16 // per, 64)
        places = to_bits(plane, 8).reshape(panels, chunks, 16 // per, 64, per, width)
        piece = from_bits(places.transpose(0, 1, 2, 4, 3, 5))
        vectors |= piece.reshape(panels, chunks, 16, 64) << shift
        at += 128 * width
        shift += width
    codes = vectors.reshape(panels, chunks, 16, ROWS, 4).transpose(0, 3, 1, 2, 4)
    return codes.reshape(panels * ROWS, chunks * CHUNK).astype(np.uint8)


# ------------------------------------------------------------------------------------- layout

SCALE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "e8m0": 1}


def padded(n, to):
    return -(-n // to) * to


def layout(bits, rows, inputs, scales):
    """Byte offsets in a panel: the sections wide, fine, offset and codes, each padded to 64."""
    chunks, supers = -(-inputs // CHUNK), -(-inputs // SUPER)
    block, kind = scales["block"], scales["kind"]
    blocks = -(-chunks * CHUNK // block)
    wide = fine = offset = 0
    if kind == "ladder":
        wide, fine = 32, -(-blocks // 2) * ROWS  # two blocks of a row share a byte
    elif kind == "row":
        wide = 32
    elif kind == "block":
        size = SCALE_BYTES[scales["scale"]]
        fine = blocks * ROWS * size
        offset = {None: 0, "min": fine, "zero": blocks * ROWS}[scales["offset"]]
    else:
        wide = 64 if scales["min"] else 32
        fine = blocks * ROWS
        offset = fine if scales["min"] and scales["sub"] != "u4" else 0
    fine_at = padded(supers * wide, 64)
    offset_at = fine_at + padded(fine, 64)
    codes_at = offset_at + padded(offset, 64)
    return {
        "panels": -(-rows // ROWS), "chunks": chunks, "super_blocks": supers, "blocks": blocks,
        "wide_bytes": wide, "fine_at": fine_at, "offset_at": offset_at, "codes_at": codes_at,
        "panel_bytes": codes_at + chunks * bits * 128,
    }  # fmt: skip


# ------------------------------------------------------------------------------ reading bytes


def bf16_to_f32(bits):
    return (np.asarray(bits, np.uint32) << 16).view(F32)


def f32_to_bf16(x):
    """Finite float32 -> bits of the nearest bfloat16, ties to even."""
    u = np.asarray(x, F32).view(np.uint32).astype(np.uint64)
    return (u + 0x7FFF + (u >> 16 & 1) >> 16).astype(np.uint16)


def read_scale(data, kind):
    """Bytes (..., size) -> float32 (...)."""
    if kind == "e8m0":
        return np.ldexp(F32(1), data[..., 0].astype(np.int32) - 127).astype(F32)
    words = np.ascontiguousarray(data).view({2: "<u2", 4: "<u4"}[data.shape[-1]])[..., 0]
    if kind == "bf16":
        return bf16_to_f32(words)
    return words.view(np.float16 if kind == "f16" else F32).astype(F32)


@dataclass
class Matrix:
    """A k-bit matrix taken apart. Arrays have one row a row of the matrix, padding cut off."""

    bits: int
    rows: int
    inputs: int
    scales: dict[str, Any]
    codes: np.ndarray  # (rows, inputs)
    levels: np.ndarray  # (rows, inputs): int32 w8 of native kinds, else codebook[code]
    scale: np.ndarray  # (rows, blocks or super-blocks) float32
    sub: np.ndarray | None = None  # (rows, blocks) int32: sub-scales
    offset: np.ndarray | None = None  # (rows, blocks): minima, zero points or sub-minima
    minimum: np.ndarray | None = None  # (rows, super-blocks) float32: scale of the sub-minima
    permutation: np.ndarray | None = None


def take_apart(header, raw):
    """A matrix from `Weight.describe()` and `Weight.raw()`."""
    bits, (rows, inputs), scales = header["bits"], header["shape"], header["scales"]
    at = layout(bits, rows, inputs, scales)
    raw = raw.reshape(at["panels"], at["panel_bytes"])
    blocks, supers = at["blocks"], at["super_blocks"]

    def per_row(start, count, size, stride=None):
        """Section (panel, count, 16 rows, size bytes) -> (rows, count, size)."""
        stride = stride or ROWS * size
        section = raw[:, start : start + count * stride].reshape(-1, count, stride)
        values = section[..., : ROWS * size].reshape(-1, count, ROWS, size)
        return values.transpose(0, 2, 1, 3).reshape(-1, count, size)[:rows]

    packed = raw[:, at["codes_at"] :].reshape(at["panels"], at["chunks"], bits * 128)
    codes = unpack(packed, bits)[:rows, :inputs]
    integer = header["codebook_type"] == "i8"
    book = np.array(header["codebook"], np.int32 if integer else F32)
    m = Matrix(bits, rows, inputs, scales, codes, book[codes], np.empty(0))
    if header["permutation"] is not None:
        m.permutation = np.array(header["permutation"])
    kind = scales["kind"]
    if kind in ("ladder", "row"):
        m.scale = read_scale(per_row(0, supers, 2, 32), "bf16")
    if kind == "ladder":
        pairs = per_row(at["fine_at"], -(-blocks // 2), 1)[..., 0]
        rungs = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1)[:, :blocks]
        m.sub = np.array(scales["ladder"], np.int32)[rungs]
        m.levels = book[codes] * m.sub[:, np.arange(inputs) // scales["block"]] + 64 >> 7
    if kind == "block":
        size = SCALE_BYTES[scales["scale"]]
        m.scale = read_scale(per_row(at["fine_at"], blocks, size), scales["scale"])
        if scales["offset"] == "min":
            m.offset = read_scale(per_row(at["offset_at"], blocks, size), scales["scale"])
        if scales["offset"] == "zero":
            stored = per_row(at["offset_at"], blocks, 1)[..., 0].astype(np.int32)
            m.offset = stored - (128 if bits == 8 else 0)
    if kind == "super":
        wide = at["wide_bytes"]
        m.scale = read_scale(per_row(0, supers, 2, wide), "f16")
        fine = per_row(at["fine_at"], blocks, 1)[..., 0]
        m.sub = {"u8": fine, "i8": fine.view(np.int8), "u4": fine & 15}[scales["sub"]]
        m.sub = m.sub.astype(np.int32)
        if scales["min"]:
            m.minimum = read_scale(per_row(32, supers, 2, wide)[:, :supers], "f16")
            u4 = scales["sub"] == "u4"
            stored = fine >> 4 if u4 else per_row(at["offset_at"], blocks, 1)[..., 0]
            m.offset = stored.astype(np.int32)
    return m


def dequantize(m):
    """(rows, inputs) float32; products and sums are rounded in the order they are written here."""
    block, wide = np.arange(m.inputs) // m.scales["block"], np.arange(m.inputs) // SUPER
    level = m.levels.astype(F32)
    if m.scales["kind"] in ("ladder", "row"):
        w = level * m.scale[:, wide]
    elif m.scales["kind"] == "block":
        offset = m.scales["offset"]
        if offset == "zero":
            level = level - m.offset[:, block].astype(F32)
        w = m.scale[:, block] * level
        if offset == "min":
            w = w + m.offset[:, block]
    else:
        w = m.scale[:, wide] * m.sub[:, block].astype(F32) * level
        if m.scales["min"]:
            w = w - m.minimum[:, wide] * m.offset[:, block].astype(F32)
    if m.permutation is None:
        return w
    out = np.empty_like(w)
    out[:, m.permutation] = w
    return out


# ----------------------------------------------------------------------------------- products


def fma(a, b, c):
    """float32(a * b + c) with one rounding.

    The product is exact in float64. Its sum with c is rounded to odd (the lowest bit set when
    anything was lost), which leaves the later rounding to float32 nothing to round twice.
    """
    p, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    with np.errstate(invalid="ignore"):
        s = p + c
        back = s - p
        lost = (p - (s - back)) + (c - back)  # Knuth: s + lost is p + c exactly
    bits = s.view(np.int64) if s.ndim else s.reshape(1).view(np.int64)
    away = (lost > 0) == (s > 0)
    odd = bits + np.where(away, 1, -1)
    fix = np.isfinite(s) & (lost != 0) & (bits & 1 == 0)
    with np.errstate(over="ignore"):  # beyond float32 is infinity
        return np.where(fix, odd, bits).view(np.float64).reshape(s.shape).astype(F32)


def quantize_activations(x):
    """x (tokens, inputs) float32 -> a8 (tokens, inputs) int32, sa (tokens, super-blocks) float32."""
    tokens, inputs = x.shape
    a8 = np.zeros((tokens, inputs), np.int32)
    sa = np.zeros((tokens, -(-inputs // SUPER)), F32)
    for t in range(tokens):
        for i in range(sa.shape[1]):
            part = x[t, i * SUPER : (i + 1) * SUPER]
            if not np.isfinite(part).all():
                sa[t, i] = np.nan
                continue
            peak = np.abs(part).max()
            if peak > F32(1e-30):
                sa[t, i] = peak / F32(127)
                a8[t, i * SUPER : (i + 1) * SUPER] = np.rint(part * (F32(127) / peak))
    return a8, sa


def matmul(m, x):
    """x (tokens, inputs) float32 -> (tokens, rows) by the integer path of docs/numerics.md."""
    if m.permutation is not None:
        x = x[:, m.permutation]
    a8, sa = quantize_activations(x)
    y = np.zeros((len(x), m.rows), F32)
    kind, block = m.scales["kind"], m.scales["block"]

    def dots(start, end):
        return a8[:, start:end].astype(np.int64) @ m.levels[:, start:end].T.astype(np.int64)

    def sums(start, end):
        return a8[:, start:end].sum(1, dtype=np.int64)[:, None]

    for i, start in enumerate(range(0, m.inputs, SUPER)):
        end = min(start + SUPER, m.inputs)
        a = sa[:, i : i + 1]
        pieces = [(b // block, b, min(b + block, end)) for b in range(start, end, block)]
        if kind in ("ladder", "row"):
            y = fma(dots(start, end).astype(F32), m.scale[None, :, i] * a, y)
        elif kind == "block":
            for k, low, high in pieces:
                dot = dots(low, high)
                if m.scales["offset"] == "zero":
                    dot = dot - m.offset[None, :, k] * sums(low, high)
                y = fma(dot.astype(F32), m.scale[None, :, k] * a, y)
                if m.scales["offset"] == "min":
                    y = fma(sums(low, high).astype(F32), m.offset[None, :, k] * a, y)
        else:
            total = sum(m.sub[None, :, k] * dots(low, high) for k, low, high in pieces)
            y = fma(total.astype(F32), m.scale[None, :, i] * a, y)
            if m.scales["min"]:
                total = sum(m.offset[None, :, k] * sums(low, high) for k, low, high in pieces)
                y = fma(total.astype(F32), -(m.minimum[None, :, i] * a), y)
    return y


def matmul_float(w, x):
    """x (tokens, inputs) @ w (rows, inputs).T by the float path: four partial sums."""
    p = [np.zeros((len(x), len(w)), F32) for _ in range(4)]
    for i in range(w.shape[1]):
        p[i % 4] = fma(w[None, :, i], x[:, i : i + 1], p[i % 4])
    return (p[0] + p[2]) + (p[1] + p[3])


# ---------------------------------------------------------------------------------- quantiser


def integer_importance(importance):
    """Importance as integers, 64 at the mean, within 1..65535."""
    mean = np.float64(0)
    for i in importance:
        mean += np.float64(i)
    mean /= len(importance)
    return np.clip(np.float64(importance) / mean * 64 + 0.5, 1, 65535).astype(np.int64)


def quantize(values, bits, codebook, scales, importance=None):
    """Codes (rows, inputs), rungs (rows, blocks) and scales (rows, super-blocks; bf16 bits).

    For every row and 256 inputs, scales up to 1.1 times peak / -127 are tried. A weight is
    looked at in 16ths of an int8 step, cut off; at each rung of the ladder it takes the level that
    is nearest to its half step (a weight half-way takes the larger one), and the rung with the
    least sum of squared errors is taken for each block, the first scale with the least sum of all.
    """
    rows, inputs = values.shape
    block = scales["block"]
    ladder = np.array(scales.get("ladder", [128]), np.int64)
    book = np.array(codebook, np.int64)
    levels = np.array([book * step + 64 >> 7 for step in ladder])  # (rungs, codes)
    low, tries = F32(0.9), 25 if bits in (6, 7) else 13
    if "ladder" not in scales and bits < 8:
        low, tries = F32(0.1) + F32(0.1) * F32(bits), 41 - 4 * bits
    steps = [(low + (F32(1.1) - low) * F32(i) / F32(tries - 1)) / F32(127) for i in range(tries)]
    weights = np.ones(inputs, np.int64) if importance is None else integer_importance(importance)
    codes = np.zeros((rows, inputs), np.uint8)
    rungs = np.zeros((rows, -(-inputs // block)), np.uint8)
    wide = np.zeros((rows, -(-inputs // SUPER)), np.uint16)
    for row in range(rows):
        for i, start in enumerate(range(0, inputs, SUPER)):
            w = values[row, start : start + SUPER]
            n = len(w)
            peak = w[np.argmax(np.abs(w))]
            if abs(peak) < F32(2.0**-100):
                continue
            best = np.inf
            for step in steps:
                scale = f32_to_bf16(-peak * step)
                sw = bf16_to_f32(scale)
                x16 = np.floor(np.clip(w / sw * F32(16), -4095, 4095)).astype(np.int64)
                half = x16 >> 3  # floor(2 x); its middle is a quarter further
                distance = np.abs(4 * levels[:, :, None] - (2 * half + 1))  # (rungs, codes, n)
                code = distance.argmin(1)  # (rungs, n), the lowest code of equal levels
                level = np.take_along_axis(levels, code, 1)
                squares = (2 * x16 + 1 - 32 * level) ** 2 * weights[start : start + n]
                first = np.arange(0, n, block)
                errors = np.add.reduceat(squares, first, 1)  # (rungs, blocks)
                rung = errors.argmin(0)
                total = float(errors.min(0).sum()) * (float(sw) * float(sw))
                if total < best:
                    best = total
                    wide[row, i] = scale
                    rungs[row, start // block : start // block + len(first)] = rung
                    chosen = rung[np.arange(n) // block]
                    codes[row, start : start + n] = code[chosen, np.arange(n)]
    return codes, rungs, wide


def assemble(bits, scales, codes, rungs, wide):
    """The bytes of a native matrix from its parts."""
    rows, inputs = codes.shape
    at = layout(bits, rows, inputs, scales)
    tall = at["panels"] * ROWS

    def full(array, columns):
        out = np.zeros((tall, columns), array.dtype)
        out[:rows, : array.shape[1]] = array
        return out.reshape(at["panels"], ROWS, columns).transpose(0, 2, 1)

    out = np.zeros((at["panels"], at["panel_bytes"]), np.uint8)
    wide = np.ascontiguousarray(full(wide, at["super_blocks"])).astype("<u2").view(np.uint8)
    out[:, : at["super_blocks"] * 32] = wide.reshape(at["panels"], -1)
    if scales["kind"] == "ladder":
        pairs = full(rungs, padded(at["blocks"], 2))
        fine = pairs[:, 0::2] | pairs[:, 1::2] << 4
        out[:, at["fine_at"] : at["fine_at"] + fine[0].size] = fine.reshape(at["panels"], -1)
    every = np.zeros((tall, at["chunks"] * CHUNK), np.uint8)
    every[:rows, :inputs] = codes
    out[:, at["codes_at"] :] = pack(every, bits).reshape(at["panels"], -1)
    return out.reshape(-1)
