"""The Rust engine of kbit. Private: use the names of the package `kbit`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

class KbitError(Exception):
    """Root of everything kbit raises on its own account."""

class ModelFormatError(KbitError, ValueError):
    """A file, header or config does not say what its format demands."""

class UnsupportedModelError(KbitError, NotImplementedError):
    """Well-formed, but nothing kbit runs."""

class ContextOverflowError(KbitError, ValueError):
    """More tokens than the context holds."""

class GrammarError(KbitError, ValueError):
    """A grammar, schema or pattern that cannot be compiled."""

class MemoryBudgetError(KbitError, MemoryError):
    """More memory than there is or was allowed."""

class DeviceError(KbitError, RuntimeError):
    """A device is missing or failed."""

class GenerationCancelled(KbitError):
    """The call was cancelled."""

def isas() -> list[str]:
    """Instruction sets this processor can run, slowest first; the first is always ``"scalar"``."""

def isa() -> str:
    """The instruction set in use: the best one, or what ``KBIT_ISA`` says."""

def build_info() -> dict[str, str]:
    """``version``, ``commit``, ``profile``, ``target``, ``rustc`` and ``features`` of this build."""

def gpu_adapters() -> list[str]:
    """Graphics adapters that wgpu finds, by name; empty when there are none or the build has no GPU part."""

def default_threads() -> int:
    """Threads used when none are asked for: ``KBIT_NUM_THREADS``, then the cores this process may use."""

def limits(*, threads: int = 0, nbytes: int = 1 << 30, runs: int = 5) -> dict[str, float]:
    """What this machine can do at most, measured now.

    ``read_bytes_per_second`` of memory, ``int8_operations_per_second`` (a multiply and an add count two), and the
    ``threads`` that took part.

    Args:
        threads: 0 for `default_threads`.
        nbytes: Memory to read; more than the caches hold.
        runs: The best of so many counts.

    Raises:
        ValueError: Nothing to measure.
        MemoryBudgetError: No room for `nbytes`.
    """

@final
class TensorFile:
    """A safetensors or GGUF file (told by its first bytes), opened and validated; tensors are read on demand.

    Raises:
        ModelFormatError: The file breaks its format; the sentence says where.
        OSError: It cannot be read.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> TensorFile: ...
    @property
    def path(self) -> str:
        """As given."""
    @property
    def format(self) -> str:
        """``"safetensors"`` or ``"gguf"``."""
    @property
    def metadata(self) -> dict[str, Any]:
        """safetensors: ``__metadata__`` (str to str). GGUF: all key-values; arrays of numbers as lists."""
    def names(self) -> list[str]:
        """Tensor names in file order."""
    def dtype(self, name: str) -> str:
        """Name in safetensors (``"BF16"``) or GGUF type (``"Q4_K"``) of a tensor."""
    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape (GGUF's dimensions reversed)."""
    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file."""
    def read(self, name: str) -> NDArray[Any]:
        """The tensor: native dtype where NumPy has it, float32 for bf16, fp8 and the quantised types of GGUF."""

@final
class Weight:
    """A matrix or vector as the engine holds it: dense (f32, f16, bf16) or k-bit in kernel order (a *KTensor*)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), or the plain shape of a dense array."""
    @property
    def nbytes(self) -> int:
        """Bytes held, all constants counted."""
    @property
    def bits(self) -> int | None:
        """Width of a code; None for dense weights."""
    @property
    def kind(self) -> str:
        """Dense: the dtype. k-bit: scale kind and codebook, e.g. ``"ladder32 i8"``."""
    @property
    def path(self) -> str:
        """``"integer"``, ``"float"`` (f32 codebook) or ``"dense"``: which kernels run."""
    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, every constant and all padding counted."""
    def dequantize(self) -> NDArray[np.float32]:
        """The values, exactly as defined in docs/numerics.md, in the shape of `shape`."""
    def codes(self) -> NDArray[np.uint8]:
        """(out_features, in_features) codes of a k-bit weight. Raises ValueError for dense ones."""
    def describe(self) -> dict[str, Any]:
        """Header of a k-bit weight: bits, codebook, scales (kind, block, ladder...), permutation, panel layout."""
    def raw(self) -> NDArray[np.uint8]:
        """The bytes in kernel order (a copy)."""
    def matmul(
        self, x: NDArray[np.float32], *, activations: str = "int8", threads: int = 0
    ) -> NDArray[np.float32]:
        """``x @ W.T``: x (tokens, in_features) -> (tokens, out_features), as the engine computes it."""

def quantize(
    array: NDArray[np.float32],
    bits: int,
    *,
    format: str = "learned",
    block: int | None = None,
    importance: NDArray[np.float32] | None = None,
    threads: int = 0,
) -> Weight:
    """Quantise (out_features, in_features) float32 to `bits` (2..8).

    Args:
        array: (out_features, in_features).
        bits: Width of a code.
        threads: 0: all that the process may use.
        format: Codebook: ``"int"``, ``"float"``, ``"quantile"``, ``"nf"`` or ``"learned"``.
        block: Inputs under one sub-scale, 16, 32 or 64; None: the best for `bits`.
        importance: (in_features,) weights of the squared error.

    Raises:
        ValueError: An argument out of range, or non-finite values.
    """

def load_weight(
    sources: Sequence[tuple[TensorFile, str]],
    *,
    transforms: Sequence[tuple[Any, ...]] = (),
    bits: int | None = None,
    dtype: str | None = None,
    format: str = "learned",
    block: int | None = None,
    threads: int = 0,
) -> Weight:
    """Read, transform and, with `bits`, quantise one weight; holds no more than this tensor unquantised.

    Args:
        sources: Tensors that are stacked along rows before the transforms (usually one).
        transforms: In order: ``("rows", from, to)``, ``("transpose",)``, ``("add", c)``, ``("scale", c)``,
            ``("permute_rope", heads, rotary_dim)`` (interleaved pairs to halves, per head), ``("select", i[, axis])``,
            ``("reshape", *shape)``.
        bits: None keeps what is stored (k-bit GGUF types stay at their own bits).
        dtype: ``"f32"``, ``"f16"``, ``"bf16"``: type of a dense result; None keeps what is stored.
        format: As in `quantize`.
        block: As in `quantize`.
        threads: 0: all that the process may use.
    """

def save_checkpoint(
    path: str | os.PathLike[str],
    spec: str,
    weights: Mapping[str, Weight],
    metadata: Mapping[str, str],
) -> None:
    """Write `model.safetensors` of docs/formats.md: temporary file, fsync, rename; a checksum per tensor."""

def open_checkpoint(
    path: str | os.PathLike[str], *, mapped: bool = False
) -> tuple[str, dict[str, Weight], dict[str, str]]:
    """(spec, weights, metadata) of a file written by `save_checkpoint`; checksums are verified.

    Args:
        path: `model.safetensors`.
        mapped: Share the pages of the file with other processes instead of copying them. The file must not be truncated
            while the weights live: the system ends a process that touches what is gone.
    """

def load_packed(
    dialect: str,
    parts: Mapping[str, tuple[TensorFile, str]],
    *,
    transforms: Sequence[tuple[Any, ...]] = (),
    bits: int | None = None,
    block: tuple[int, int] | None = None,
) -> Weight:
    """A weight of a safetensors dialect at its own bits, every value as it is.

    Args:
        dialect: And its parts (those in brackets may be absent): ``"gptq"`` (stored zero points are less one) and
            ``"gptq_v2"``: qweight, qzeros, scales, [g_idx]; ``"awq"``: qweight, qzeros, scales; ``"compressed"``:
            weight_packed, weight_scale, [weight_zero_point], [weight_g_idx]; ``"bitsandbytes"``: weight, absmax,
            quant_map, quant_state, [nested_absmax], [nested_quant_map]; ``"mxfp4"``: blocks, scales; ``"fp8"``: weight,
            weight_scale.
        parts: The file and the tensor that play each part.
        transforms: ``"rows"`` and ``"permute_rope"`` as in `load_weight`; for mxfp4 also ``"select"`` first.
        bits: Needed by gptq (2, 3, 4, 8) and compressed (2, 4, 8).
        block: (rows, inputs) under one scale of block-wise fp8.

    Raises:
        ModelFormatError: Parts that do not fit each other.
        UnsupportedModelError: What the engine's layout cannot hold; the sentence says what.
    """

def save_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[
        tuple[str, Sequence[Weight | NDArray[np.float32]], bool, tuple[int, int] | None]
    ],
) -> dict[str, str]:
    """Write GGUF version 3 whose dequantised values are exactly those of the weights; whole or not at all.

    Weights that came from a GGUF type keep it, native ones become Q8_0 where that is exact, all others F32; vectors
    are F32 always, as llama.cpp wants them.

    Args:
        path: The file to write.
        metadata: bool, int (written as u32 where it fits), float (f32), str, bytes (u8 array), and lists (int as i32).
        tensors: (name, weights or arrays of one shape, whether they are stacked along a new outermost dimension or their
            rows follow one another, (heads, rotated rows of a head) of a rotary projection whose halves become pairs side
            by side, or None).

    Returns:
        The GGUF type of each tensor.
    """

@final
class Engine:
    """A model on a device with its KV cache and its step loop, a Rust thread that never holds the GIL.

    Safe to share between threads. Concurrent requests run in one batch and give the same tokens as alone.
    """

    def __new__(
        cls,
        spec: str,
        weights: Mapping[str, Weight],
        *,
        device: str = "cpu",
        threads: int = 0,
        kv: str = "f16",
        cache_bytes: int = 0,
        activations: str = "int8",
        context: int | None = None,
        max_batch: int = 16,
        max_waiting: int = 16384,
    ) -> Engine:
        """Bind weights (canonical names) to a device and start the loop.

        Args:
            spec: A model spec in JSON.
            weights: By canonical name; shared, not copied.
            device: ``"cpu"``, or ``"reference"``: plain loops, for tests.
            threads: 0: `default_threads`.
            kv: Type of cached keys and values: ``"f16"``, ``"bf16"``, ``"f32"`` or ``"int8"``.
            cache_bytes: What the cache may grow to; 0: half of what is free at the first step.
            activations: ``"int8"`` into k-bit weights, or ``"f32"``, for measuring.
            context: Positions of a sequence, if fewer than the model has.
            max_batch: Requests that run at once; others wait.
            max_waiting: Requests and passes that may wait for a place; one more raises MemoryBudgetError.

        Raises:
            ModelFormatError: Spec and weights do not fit; the sentence names every tensor on both sides.
        """
    @property
    def context(self) -> int:
        """Positions a sequence may have."""
    @property
    def threads(self) -> int:
        """Threads of the device."""
    @property
    def device(self) -> str:
        """Name of the device."""
    def submit(
        self,
        ids: NDArray[np.uint32],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> Request:
        """Queue a prompt. Ends at an id of `eos` (which is emitted last), after `max_new_tokens`, or at the context's end.

        Raises:
            ValueError: An empty prompt, an id outside the vocabulary, or a sampling value out of range.
            ContextOverflowError: A prompt that leaves no room in the context.
            MemoryBudgetError: As many requests wait as may.
            DeviceError: The engine was closed.
        """
    def forward(
        self, ids: NDArray[np.uint32], *, hidden_states: bool = False, attentions: bool = False
    ) -> dict[str, Any]:
        """One pass over fresh ids; KeyboardInterrupt is honoured between operations.

        ``logits`` (n, vocab) float32; on request ``hidden_states`` [(n, hidden)...] and ``attentions`` [(heads, n, n)...].
        """
    def score(self, ids: NDArray[np.uint32], start: int = 1) -> NDArray[np.float32]:
        """Log-probability of ids[start:], each given all ids before it."""
    def stats(self) -> dict[str, float]:
        """Counters: tokens of prompts and generated, seconds in prefill and decode, steps, preemptions; bytes of cache, requests running and waiting now."""
    def trace(self, on: bool) -> dict[str, int]:
        """Matrix products since tracing was turned on, by kernel (``"k4 ladder32 avx512vbmi m1"``); turns it on or off."""
    def close(self) -> None:
        """Stop the loop and free the cache. Requests under way end with DeviceError. Twice is fine."""

@final
class Request:
    """A prompt under way."""

    def wait(self, timeout: float = 0.05) -> list[Token] | None:
        """Tokens since the last call, waiting up to `timeout` seconds for the first; None once everything was handed out.

        Raises what ended the request, if it failed; KeyboardInterrupt is raised here within 50 ms of the signal.
        """
    @property
    def finish_reason(self) -> str | None:
        """``"stop"`` (eos), ``"length"``, ``"context"``, ``"cancelled"``; None while it runs."""
    @property
    def prompt_seconds(self) -> float:
        """Seconds from the start of prefill to the first token."""
    @property
    def decode_seconds(self) -> float:
        """Seconds from the first token to the last."""
    def cancel(self) -> None:
        """End the request at the next operation; its memory is freed then."""

@final
class Token:
    """One generated token."""

    @property
    def id(self) -> int: ...
    @property
    def logprob(self) -> float | None:
        """Natural logarithm of its probability before sampling changed the logits; None unless asked for."""
    @property
    def top(self) -> list[tuple[int, float]]:
        """The most likely ids and their log-probabilities, as many as asked for."""
