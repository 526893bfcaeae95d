"""What the network tests share: two tiny T5s, one of each version, and random parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from dro_jax.networks import T5Config

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "emb_dim": 16,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 20,
    "relative_buckets": 8,
    "relative_max_distance": 12,
    "dtype": "float32",
}
GATED = T5Config(num_encoder_layers=2, num_decoder_layers=1, **SIZES)
TIED = T5Config(
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_activations=("relu",),
    logits_via_embedding=True,
    **SIZES,
)


@pytest.fixture(params=[GATED, TIED], ids=["v1_1", "v1_0"], scope="session")
def config(request: pytest.FixtureRequest) -> T5Config:
    """Version 1.1 (gated GELU, untied) and version 1.0 (ReLU, tied), both float32."""
    return request.param


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """A function that fills a module's parameters, norms and value head too, with values of T5's size.

    From NumPy, as compiling the initialiser takes longer than the tests.
    """

    def build(module: Any, *inputs: Any, seed: int = 0) -> Any:
        shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
        rng = np.random.default_rng(seed)

        def fill(path: Any, leaf: Any) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            noise = rng.standard_normal(leaf.shape)
            if name.endswith("scale"):
                noise = 1 + 0.3 * noise
            elif name.endswith("kernel"):
                head_dim = module.config.head_dim if name.endswith("query/kernel") else 1
                noise = noise * (leaf.shape[0] * head_dim) ** -0.5
            return jnp.asarray(noise, jnp.float32)

        return jax.tree_util.tree_map_with_path(fill, shapes)

    return build
