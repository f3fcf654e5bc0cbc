"""What the tests of the linear head share."""

import functools

import pytest

from jaxsoftmax.linear_head import budget
from tests.linear_head.test_cross_entropy import fused


@pytest.fixture
def streamed(monkeypatch):
    """Chunks of 3 tokens, blocks of 4 classes: ragged in both. The head without a chunk size then streams."""
    monkeypatch.setattr(budget, "default_chunk", lambda *_: (3, 4))
    return functools.partial(fused, chunk_size=None)
