"""The training loop."""

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from dro_jax.errors import DivergenceError, check_number
from dro_jax.training.step import TrainStep
from dro_jax.training.train_state import TrainState

logger = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]
Scalars = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Periods:
    """How often, in steps, things happen beside training; the last step does all of them.

    Attributes:
      log: metrics to the log.
      evaluate: the held-out split.
      checkpoint: save.
    """

    log: int = 50
    evaluate: int = 2000
    checkpoint: int = 2000

    def __post_init__(self) -> None:
        """Raises UsageError unless all are whole numbers of steps."""
        for name, period in dataclasses.asdict(self).items():
            check_number(f"Periods.{name}", period, whole=True, at_least=1)


class EvaluationLeft(Exception):
    """Raised in an evaluation in which the run was asked to stop: what has been learnt is saved instead."""


class StopRequest:
    """Whether someone asked the run to stop, by Ctrl-C or SIGTERM; a second Ctrl-C stops it at once.

    Of several processes each may be asked, and all stop after the same step: JAX's preemption service tells
    the others of a SIGTERM.
    """

    def __init__(self) -> None:
        """No request yet."""
        self.signal: signal.Signals | None = None
        self._shared = jax.process_count() > 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals while the context lasts."""
        # With several processes SIGTERM belongs to the preemption service.
        caught = (signal.SIGINT,) if self._shared else (signal.SIGINT, signal.SIGTERM)
        previous = {s: signal.signal(s, self._note) for s in caught}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop now that this many steps are done; to be asked after every step, by every process."""
        if self._shared and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
            return True
        return self._alone_asked()

    def leave_evaluation(self) -> None:
        """Raises EvaluationLeft if the run is to stop; several processes, which would part, go on to its end."""
        if self._alone_asked():
            raise EvaluationLeft

    def _alone_asked(self) -> bool:
        return not self._shared and self.signal is not None

    def _note(self, number: int, frame: Any) -> None:
        del frame
        # Schedulers repeat SIGTERM; that must not cut off the save it asked for.
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    state: TrainState,
    reference: Any,
    *,
    train_step: TrainStep,
    batches: Iterator[tuple[HostBatch, Any]],
    batch_sharding: NamedSharding,
    num_steps: int,
    periods: Periods,
    log: Callable[[int, Scalars], None],
    evaluate: Callable[[int, TrainState], None],
    save: Callable[[TrainState, Any], None],
    stop: StopRequest,
    progress: Callable[[int], None],
) -> TrainState:
    """Trains from `state.step` up to `num_steps`, or until asked to stop.

    Args:
      state: where to start; its buffers are donated.
      reference: parameters of pi_ref, or None.
      train_step: of `make_train_step`.
      batches: whole batches, the same in every process, beginning with that of step `state.step`, each with
        the place in the data after it.
      batch_sharding: how a batch lies on the mesh.
      num_steps: steps of the whole run, those already done included.
      periods: how often to log, evaluate and save; the first step is logged too.
      log: takes the number of steps done and means of the metrics since the last call.
      evaluate: takes the number of steps done and the state; may raise EvaluationLeft.
      save: takes a state that is finite, as its losses and gradients were, and the place in the data after
        the last batch that went into it, however far ahead `batches` has read.
      stop: asked after every step, by every process.
      progress: takes the number of steps done, after every step.

    Returns:
      The last state, which has been saved.

    Raises:
      DivergenceError: if a loss, gradient or parameter is not finite; nothing is saved after the step named.
    """
    on_cpu = jax.default_backend() == "cpu"
    first = done = int(state.step)
    pending: list[dict[str, jax.Array]] = []
    clock = time.perf_counter()
    finished = done >= num_steps
    while not finished:
        batch, position = next(batches)
        state, metrics = train_step(state, reference, to_devices(batch, batch_sharding))
        pending.append(metrics)
        done += 1
        progress(done)
        if done == first + 1 or on_cpu:
            # On CPU a step that is waiting would have taken its memory beside that of the one before.
            jax.block_until_ready(metrics)
        if done == first + 1:
            # The first step's time is the compiler's; it would hide the speed of the others.
            clock = time.perf_counter()

        finished = stop.after(done) or done == num_steps
        evaluation_due = done == num_steps or done % periods.evaluate == 0
        checkpoint_due = finished or done % periods.checkpoint == 0
        log_due = done % periods.log == 0 or done == first + 1
        if not (log_due or evaluation_due or checkpoint_due):
            continue
        values = jax.device_get(pending)
        check_finite(values, done - len(values))
        timed = values[1:] if done - len(values) == first else values
        log(done, summarise(values, timed, time.perf_counter() - clock))
        pending = []
        if evaluation_due:
            try:
                evaluate(done, state)
            except EvaluationLeft:
                logger.warning("step %d is not evaluated: asked to stop", done)
                finished = checkpoint_due = True
        if checkpoint_due:
            save(state, position)
        clock = time.perf_counter()
    return state


def to_devices(batch: HostBatch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """A batch that every process holds, each device taking its rows."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }


def check_finite(metrics: list[dict[str, Any]], first_step: int) -> None:
    """Raises DivergenceError for the first step whose loss, gradient or parameters are not finite."""
    for step, values in enumerate(metrics, start=first_step + 1):
        for name, value in values.items():
            if name.split("/")[0] in ("loss", "grad_norm", "parameter_norm") and not np.isfinite(
                value
            ):
                raise DivergenceError(
                    f"{name} is {float(value)} at step {step}: stopped, the checkpoints before it are "
                    "sound; try a lower learning rate or look at the rewards of the data"
                )


def summarise(
    metrics: list[dict[str, Any]], timed: list[dict[str, Any]], seconds: float
) -> Scalars:
    """Means of the metrics over an interval (the last learning rate), and the speed of its timed steps."""
    summary = {
        name: float(values[-1] if name.startswith("learning_rate") else np.mean(values))
        for name in metrics[0]
        for values in [[m[name] for m in metrics]]
    }
    if timed:
        examples, tokens = (sum(m[f"data/{k}"] for m in timed) for k in ("examples", "tokens"))
        summary["speed/examples_per_second"] = float(examples / seconds)
        summary["speed/tokens_per_second"] = float(tokens / seconds)
        summary["speed/steps_per_second"] = len(timed) / seconds
    return summary
