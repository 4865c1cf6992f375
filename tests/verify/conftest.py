"""One small verification for all tests of this folder: its references are computed once."""

from __future__ import annotations

import pytest

from distllm.verify.command import Verification
from tests.verify.small import verification_of


@pytest.fixture(scope="session")
def verification(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """A Llama whose embeddings are tied, on byte-level text."""
    return verification_of(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """A Mixtral on the same text."""
    sizes = "{hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 2, num_local_experts: 4}"
    return verification_of(tmp_path_factory.mktemp("mixture"), f"model={{type: mixtral, sizes: {sizes}}}")
