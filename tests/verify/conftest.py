"""One small verification for all tests of this folder: its references are computed once."""

from __future__ import annotations

import pytest

from distllm.verify.command import Verification
from tests.verify.small import verification_of


@pytest.fixture(scope="session")
def verification(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """A Llama whose embeddings are tied, on byte-level text."""
    return verification_of(tmp_path_factory.mktemp("verify"))
