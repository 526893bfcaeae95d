"""What tests/conftest.py and pyproject.toml promise, seen to fire."""

import warnings

import jax
import jax.numpy as jnp
import pytest


def test_adding_arrays_of_different_rank_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(3) + jnp.ones((2, 3))


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn("planted", stacklevel=1)


def test_there_are_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
