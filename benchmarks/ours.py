"""Our side of the training benchmarks: DRO-V by `dro_jax.training.step`, from arrays alone."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from dro_jax.data.packing import Batch
from dro_jax.networks import T5Config
from dro_jax.training import loop, partitioning, step, train_state
from dro_jax.training.algorithms import DroV
from dro_jax.training.optimizers import Adafactor

ALGORITHM = DroV()
OPTIMIZER = Adafactor()


@dataclasses.dataclass
class Trainer:
    """A training on one device.

    Attributes:
      config: shape of all networks.
      layout: of its state.
      state: where it is.
      reference: parameters of pi_ref, used where batches do not carry its log-probabilities.
      train_step: the jitted step.
    """

    config: T5Config
    layout: train_state.Layout
    state: train_state.TrainState
    reference: Any
    train_step: step.TrainStep

    def run(self, batches: Sequence[Batch]) -> float:
        """Takes a step on each of these batches and returns the seconds that all of them took."""
        begin = time.perf_counter()
        metrics = None
        for batch in batches:
            reference = None if "reference_log_probs" in batch else self.reference
            arrays = loop.to_devices(batch, self.sharding)
            self.state, metrics = self.train_step(self.state, reference, arrays)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin

    @property
    def sharding(self) -> NamedSharding:
        """Of the batches."""
        return partitioning.batch_sharding(self.layout.mesh, self.layout.rules)


def make_trainer(config: T5Config, devices: int = 1) -> Trainer:
    """Returns a training from random weights on the first devices, over which rows and weights are cut."""
    rules = partitioning.Partitioning(fsdp=devices)
    transforms = OPTIMIZER.transforms()
    layout = train_state.make_layout(
        config, transforms, has_value=True, mesh=rules.mesh(jax.devices()[:devices]), rules=rules
    )
    reference = train_state.init_reference(config, 0, layout)
    return Trainer(
        config=config,
        layout=layout,
        state=train_state.init_state(config, transforms, reference, 0, layout),
        reference=reference,
        train_step=step.make_train_step(
            config, ALGORITHM, transforms, OPTIMIZER.schedules(), layout
        ),
    )
