"""A T5 that fits in the head, random weights for it, and prompts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from dro_jax.networks import T5, T5Config

EOS = 1
CONFIG = T5Config(
    vocab_size=12,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dtype="float32",
)
ONE_LAYER = dataclasses.replace(CONFIG, num_decoder_layers=1)
PROMPTS = np.array(
    [[5, 6, 7, 1], [3, 1, 0, 0], [9, 9, 2, 1], [4, 1, 0, 0], [8, 2, 1, 0], [11, 1, 0, 0]], np.int32
)


def random_params(config: T5Config, seed: int, scale: float) -> Any:
    """Normal weights; a larger scale makes choices sharper."""
    tokens = jnp.ones((1, 1), jnp.int32)
    shapes = meta.unbox(
        jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens)["params"]
    )
    rng = np.random.default_rng(seed)

    def fill(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.normal(size=shape.shape, scale=scale).astype(np.float32)
        return noise if noise.ndim > 1 else 1 + noise

    return jax.tree.map(fill, shapes)
