"""Model ids of the Hugging Face hub, through `huggingface_hub` and all its environment variables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from kbit._core import UnsupportedModelError
from kbit.text.hf_json import read_json

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "spiece.model",
    "additional_chat_templates/*.jinja", "quantize_config.json", "quant_config.json",
)  # fmt: skip
"""Small files worth having next to the weights."""
_SPARE = ("consolidated", "adapter_")
"""Beginnings of safetensors that hold the same weights again, or no whole model."""
_NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def is_id(name: str) -> bool:
    """Whether `name` is written like a hub id: owner/name."""
    return _ID.fullmatch(name) is not None


def is_file_id(name: str) -> bool:
    """Whether `name` is written like a file of the hub: owner/name/file.gguf, also in a folder."""
    parts = name.split("/")
    return (
        len(parts) > 2
        and is_id("/".join(parts[:2]))
        and not any(part in ("", ".", "..") for part in parts)
        and name.endswith((".gguf", ".safetensors"))
    )


def fetch(
    name: str,
    *,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    token: str | None = None,
) -> Path:
    """The directory of a model from the cache or the hub.

    Only the configuration, the tokenizer and one set of safetensors are fetched, never pickled
    weights and never code.

    Args:
        name: owner/name.
        revision: Branch, tag or commit; None: the main branch. All files are of one commit.
        cache_dir: Where the cache is; None: as `HF_HUB_CACHE` and `HF_HOME` say.
        local_files_only: Do not use the network, as with `HF_HUB_OFFLINE=1`.
        token: Of the hub; None: `HF_TOKEN`, or that of `hf auth login`.

    Raises:
        OSError: There is no such model or revision, no access, no network, or nothing in the cache.
        UnsupportedModelError: The model has no safetensors; the sentence says what to do.
    """
    from huggingface_hub import HfApi, snapshot_download  # pyright: ignore[reportUnknownVariableType]

    patterns = None
    if not local_files_only:
        try:
            found = HfApi(token=token).model_info(name, revision=revision)
        except Exception as error:
            if not _is_network(error):
                raise _explained(name, revision, error) from None
        else:
            patterns = [
                *_BESIDE,
                *_weights(name, [each.rfilename for each in found.siblings or ()]),
            ]
    try:
        path = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            # What of a model was fetched is not known offline; that a config was is enough to find it.
            allow_patterns=patterns or ["config.json"],
        )
    except Exception as error:
        raise _explained(name, revision, error) from None
    if patterns is None:
        _check_whole(name, Path(path))
    return Path(path)


def _check_whole(name: str, directory: Path) -> None:
    """Raise FileNotFoundError if a directory of the cache lacks weights."""
    index = directory / "model.safetensors.index.json"
    missing: list[str] = []
    if index.is_file():
        shards: Any = (read_json(index) or {}).get("weight_map")
        named = cast("dict[str, Any]", shards).values() if isinstance(shards, dict) else ()
        missing = sorted({str(file) for file in named if not (directory / str(file)).is_file()})
    elif not any(directory.glob("*.safetensors")):
        missing = ["*.safetensors"]
    if missing:
        raise FileNotFoundError(
            f"{name}: the local cache lacks {', '.join(missing[:4])}, and the hub is not reached"
        )


def fetch_file(
    name: str,
    *,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    token: str | None = None,
) -> Path:
    """One file of a model, `owner/name/file.gguf`, with the other parts if it is one of several.

    Arguments and errors are those of `fetch`.
    """
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

    owner, repository, file = name.split("/", 2)
    files = [file]
    split = _PART.fullmatch(file)
    if split:
        count = int(split[3])
        if not 1 <= count <= 1000:
            raise UnsupportedModelError(f"{name}: one of {count} parts; at most 1000 are read")
        files = [f"{split[1]}-{i:05}-of-{split[3]}.gguf" for i in range(1, count + 1)]
    try:
        paths = [
            hf_hub_download(
                f"{owner}/{repository}",
                each,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
            for each in files
        ]
    except Exception as error:
        raise _explained(name, revision, error) from None
    return Path(paths[files.index(file)])


def _weights(name: str, files: Sequence[str]) -> list[str]:
    """The safetensors of a model, one set of them."""
    top = [file for file in files if "/" not in file]
    tensors = [f for f in top if f.endswith(".safetensors") and not f.startswith(_SPARE)]
    shards = [f for f in tensors if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f)]
    if "model.safetensors" in tensors:
        return ["model.safetensors"]
    if shards:
        return [*shards, "model.safetensors.index.json"]
    if tensors:
        return [*tensors, *(f for f in top if f.endswith(".safetensors.index.json"))]
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        shown = ", ".join(ggufs[:12]) + (f" and {len(ggufs) - 12} more" if len(ggufs) > 12 else "")
        raise UnsupportedModelError(
            f"{name}: holds GGUF files; ask for one of them, such as '{name}/{ggufs[0]}'. There are {shown}"
        )
    pickled = [file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise UnsupportedModelError(
            f"{name}: holds pickled weights only ({pickled[0]}), which are programs, and kbit opens none. Convert "
            f"them once where you trust them: transformers' AutoModelForCausalLM.from_pretrained({name!r})"
            ".save_pretrained('dir') writes safetensors; then load 'dir'"
        )
    raise UnsupportedModelError(
        f"{name}: holds no weights that kbit reads, among {len(files)} files"
    )


def _is_network(error: Exception) -> bool:
    """Whether the hub could not be reached, or is in trouble itself: the cache may still have it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    family = type(error).__module__.partition(".")[0]
    return (
        isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError)
        or family in _NETWORK
    )


def _explained(name: str, revision: str | None, error: Exception) -> OSError:
    """What to do about an error of the hub."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{name}: access to this model must be granted first: accept its terms on its page, then set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name}: the model has no revision {revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{name}: the hub has no such model, or it is private and HF_TOKEN is not set"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{name}: not in the local cache{at}, and the hub is not reached: {_first(error)}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{name}: the model has no such file{at}")
    return OSError(f"{name}{at}: {type(error).__name__}: {_first(error)}")


def _first(error: Exception) -> str:
    """The first line of an error."""
    return str(error).strip().split("\n", 1)[0]
