"""k-bit inference for language models."""
