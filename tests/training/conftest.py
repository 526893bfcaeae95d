"""What the training tests share: a tiny T5, batches by step, and compiled DRO-V steps, one a mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
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
ROWS, PROMPT, RESPONSE = 16, 7, 5
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

        tree = jax.tree_util.tree_map_with_path(fill, self.layout.shapes.policy)
        return put(tree, self.layout.shardings.policy)

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
    """Arrays of JAX's own: the step may reuse their memory."""
    return jax.tree.map(lambda x, s: jax.device_put(x, s, may_alias=False), tree, shardings)


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


@pytest.fixture(scope="session")
def bench() -> Callable[..., Bench]:
    """A function that makes a `Bench`; by default DRO-V at tau 0.5 and default rates on one device."""
    return make_bench


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """`jax.jit` that compiles quickly."""
    return functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., loop.HostBatch]:
    """A function from a step to its batch; held-out prompts are those with an odd sum of letters.

    A prompt is a rater (token 2, 3 or 4, whose rewards are 1.2 apart) and up to six letters; a response
    up to four tokens and the end of sequence.
    """

    def make(step: int, *, held_out: bool = False) -> loop.HostBatch:
        rng = np.random.default_rng([step, held_out])
        rater = rng.integers(2, 5, ROWS)
        letters = rng.integers(5, 32, (ROWS, PROMPT - 1))
        letters *= np.arange(PROMPT - 1) < rng.integers(1, PROMPT, ROWS)[:, None]
        odd = letters.sum(axis=1) % 2
        letters[:, 0] += np.where(odd == held_out, 0, np.where(letters[:, 0] < 31, 1, -1))
        length = rng.integers(0, RESPONSE, ROWS)[:, None]
        targets = np.where(
            np.arange(RESPONSE) < length, rng.integers(5, 32, (ROWS, RESPONSE)), 0
        ) + (np.arange(RESPONSE) == length)
        batch = {
            "encoder_input_tokens": np.concatenate([rater[:, None], letters], axis=1),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": targets > 0,
        }
        rewards = 1.2 * (rater - 3) + 0.5 * rng.standard_normal(ROWS)
        return {name: array.astype(np.int32) for name, array in batch.items()} | {
            "rewards": rewards.astype(np.float32)[:, None],
            "reward_weights": np.ones((ROWS, 1), np.float32),
        }

    return make
