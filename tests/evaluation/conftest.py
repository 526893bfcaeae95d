"""How many steps a decoding takes."""

from collections.abc import Iterator

import jax
import pytest

from dro_jax.evaluation.sampling import make_sampler
from dro_jax.networks import T5


@pytest.fixture
def decoding_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """A list that grows with every step of the samplers that are made in a test."""
    steps: list[None] = []
    original = T5.decode_step

    def counted(self, *arguments):
        jax.debug.callback(lambda: steps.append(None))
        return original(self, *arguments)

    monkeypatch.setattr(T5, "decode_step", counted)
    make_sampler.cache_clear()
    yield steps
    make_sampler.cache_clear()
