"""A method on a mesh, ready to train: for tests, and for the processes that they start."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dro_jax.networks import T5Config
from dro_jax.training import loop, partitioning, step, train_state
from dro_jax.training.algorithms import Algorithm, DroV
from dro_jax.training.optimizers import Adafactor

CONFIG = T5Config(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=12,
    dtype="float32",
)
DRO_V, DEFAULT = DroV(tau=0.5), Adafactor()
QUICK = {"xla_backend_optimization_level": 0}
"""Compiles in half the time what a test calls a few times."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A method on a mesh, ready to train: everything but the batches."""

    config: T5Config
    algorithm: Algorithm
    optimizer: Adafactor
    layout: train_state.Layout

    @functools.cached_property
    def train_step(self) -> step.TrainStep:
        """The jitted step, compiled on its first call."""
        transforms, schedules = self.optimizer.transforms(), self.optimizer.schedules()
        return step.make_train_step(self.config, self.algorithm, transforms, schedules, self.layout)

    def quick_step(self, reference: Any, batch: loop.HostBatch) -> step.TrainStep:
        """The step compiled for such a reference and batch, for a few calls."""
        lowered = self.train_step.lower(self.state(), reference, self.to_devices(batch))
        return lowered.compile(compiler_options=QUICK)

    @functools.cached_property
    def reference(self) -> Any:
        """`host_reference` on the mesh."""
        return put(self.host_reference, self.layout.shardings.policy)

    @functools.cached_property
    def host_reference(self) -> Any:
        """Random weights of T5's size, from NumPy: compiling the initialiser takes seconds."""
        rng = np.random.default_rng(0)

        def fill(path: Any, leaf: Any) -> np.ndarray:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            noise = rng.standard_normal(leaf.shape, np.float32)
            if name.endswith("scale"):
                noise = 1 + 0.1 * noise
            elif name.endswith("kernel"):
                fan_in = leaf.shape[0] * (self.config.head_dim if "query" in name else 1)
                noise = noise / np.float32(math.sqrt(fan_in))
            return noise

        return jax.tree_util.tree_map_with_path(fill, self.layout.shapes.policy)

    @functools.cached_property
    def first_state(self) -> train_state.TrainState:
        """The state at step 0 as `init_state` makes it, on the host."""
        transforms = self.optimizer.transforms()
        state = train_state.init_state(self.config, transforms, self.reference, 0, self.layout)
        return jax.tree.map(np.array, state)

    def state(self, **parts: Any) -> train_state.TrainState:
        """A fresh copy of the first state, with parts replaced; it may be donated."""
        return put(self.first_state.replace(**parts), self.layout.shardings)

    def to_devices(self, batch: loop.HostBatch) -> dict[str, jax.Array]:
        """The batch as the step takes it."""
        return loop.to_devices(batch, partitioning.batch_sharding(self.layout.mesh))


def put(tree: Any, shardings: Any) -> Any:
    """Arrays of JAX's own, on the devices of all processes: the step may reuse their memory."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(
            np.shape(x), s, lambda index: np.array(np.asarray(x)[index])
        ),
        tree,
        shardings,
    )


@functools.cache
def make_bench(
    sizes: tuple[int, ...] = (1, 1, 1),
    algorithm: Algorithm = DRO_V,
    optimizer: Adafactor = DEFAULT,
    config: T5Config = CONFIG,
) -> Bench:
    """The bench of a method on a mesh of the first devices, made once a session."""
    devices = np.asarray(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    layout = train_state.make_layout(
        config,
        optimizer.transforms(),
        has_value=algorithm.needs.value == "network",
        mesh=Mesh(devices, partitioning.MESH_AXES),
        rules=partitioning.Partitioning(),
    )
    return Bench(config, algorithm, optimizer, layout)
