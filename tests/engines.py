"""Engines made by the functions of `kbit._core` alone, for the tests of what lies under the package."""

import json

from kbit import _core, archs


def parts(directory, dtype="f32"):
    """(spec as JSON, weights by canonical name) of a Hugging Face directory."""
    described = archs.describe(json.loads((directory / "config.json").read_text()))
    file = _core.TensorFile(directory / "model.safetensors")
    weights = {
        name: _core.load_weight([(file, s.tensor)], transforms=s.transforms, dtype=dtype)
        for name, s in described.sources(file.names()).items()
    }
    return described.spec.to_json(), weights


def load(directory, dtype="f32", **options):
    """An engine over a Hugging Face directory."""
    return _core.Engine(*parts(directory, dtype), **options)


def finish(request):
    """All tokens of a request."""
    tokens = []
    while (new := request.wait()) is not None:
        tokens += new
    return tokens
