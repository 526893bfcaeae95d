"""Twenty steps of each method on packed rows, for `test_equivalence` and the processes that it starts."""

import dataclasses

import jax
import numpy as np
import optax
from benches import QUICK, put

from dro_jax.data.packing import fill_rows
from dro_jax.training import step, train_state
from dro_jax.training.algorithms import DroP, DroV, Kto, Pairwise, Sft
from dro_jax.training.optimizers import Adafactor

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Descent:
    """Plain gradient descent, which compiles in half of Adafactor's time."""

    def schedules(self):
        return {"policy": lambda step: 0.02, "value": lambda step: 0.02}

    def transforms(self):
        return {"policy": optax.sgd(0.02), "value": optax.sgd(0.02)}


OPTIMIZERS = {"adafactor": Adafactor(), "descent": Descent()}
LENGTHS = {"inputs": 16, "targets": 12}
METHODS = {
    "dro_v": DroV(tau=0.5),
    "dro_v_single_value": DroV(tau=0.5, values="single"),
    "dro_p": DroP(tau=0.5),
    "kto": Kto(tau=0.5),
    "dpo": Pairwise(tau=0.5),
    "sft": Sft(),
}


def packed_batch(number, rows=16, slots=3):
    """Rows of one to three examples, a row without any, rewards that differ in spread from row to row."""
    rng = np.random.default_rng([7, number])

    def text(longest):
        return np.append(rng.integers(3, 32, rng.integers(0, longest)), 1).astype(np.int32)

    def example(row):
        return {
            "inputs": text(5),
            "targets": text(4),
            "mismatched_targets": text(4),
            "rewards": np.float32([row / 8 - 1 + rng.normal() * (row % 3)]),
        }

    packed = [[example(row) for _ in range(rng.integers(1, slots + 1))] for row in range(rows)]
    packed[number % rows] = []
    return fill_rows(packed, lengths=LENGTHS, max_examples=slots)


def history(one, make, microbatches=1):
    """Metrics of 20 steps from one start, away from the reference and from V = 0, and the last state."""
    rng = np.random.default_rng(1)

    def moved(tree):
        return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), tree)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), one.layout.shapes)
    value = train_state.value_from_policy(one.host_reference, zeros.value)
    state = zeros.replace(policy=moved(one.host_reference), value=moved(value))
    state = put(state, one.layout.shardings)
    transforms, schedules = one.optimizer.transforms(), one.optimizer.schedules()
    train_step = step.make_train_step(
        one.config, one.algorithm, transforms, schedules, one.layout, microbatches
    )
    lowered = train_step.lower(state, one.reference, one.to_devices(make(0)))
    train_step = lowered.compile(compiler_options=QUICK)
    found = []
    for number in range(STEPS):
        state, metrics = train_step(state, one.reference, one.to_devices(make(number)))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state
