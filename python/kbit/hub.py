"""Model ids of the Hugging Face hub, through `huggingface_hub` and all its environment variables."""

from __future__ import annotations

import re
from pathlib import Path

from kbit._core import ModelFormatError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "spiece.model",
    "quantize_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""Small files worth having next to the weights."""


def is_id(name: str) -> bool:
    """Whether `name` is written like a hub id: owner/name."""
    return _ID.fullmatch(name) is not None


def is_file_id(name: str) -> bool:
    """Whether `name` is written like a file of the hub: owner/name/file.gguf."""
    owner_name, _, file = name.rpartition("/")
    return is_id(owner_name) and file.endswith((".gguf", ".safetensors"))


def fetch(
    name: str, *, revision: str | None, cache_dir: str | None, local_files_only: bool
) -> Path:
    """The directory of a model from the cache or the hub.

    Only the configuration, the tokenizer and safetensors are fetched, never pickled weights or code.

    Raises:
        OSError: There is no such model, no network, or nothing in the cache.
        ModelFormatError: The model has no safetensors.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[*_BESIDE, "*.safetensors", "*.safetensors.index.json"],
            ignore_patterns=["*/*"],
        )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{name}: not in the local cache and the hub cannot be reached: {error}"
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(f"{name}: {error}") from None
    directory = Path(path)
    if not any(directory.glob("*.safetensors")):
        raise ModelFormatError(
            f"{name}: holds no *.safetensors; kbit opens no pickled weights (.bin, .pt). "
            "For GGUF files of the hub pass 'owner/name/file.gguf'"
        )
    return directory


def fetch_file(
    name: str, *, revision: str | None, cache_dir: str | None, local_files_only: bool
) -> Path:
    """One file of a model: `owner/name/file.gguf`.

    Raises:
        OSError: There is no such file, no network, or nothing in the cache.
    """
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, repository, file = name.split("/", 2)
    try:
        return Path(
            hf_hub_download(
                f"{owner}/{repository}",
                file,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{name}: not in the local cache and the hub cannot be reached: {error}"
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(f"{name}: {error}") from None
