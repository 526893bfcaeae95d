"""Adafactor for policy and value, each with a learning rate and a state of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from dro_jax.errors import check_number

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """The paper's optimiser (arXiv 2405.19107, section 5): Adafactor with linear warm-up, then constant.

    Attributes:
      policy_learning_rate: of the policy, relative to each parameter's root mean square.
      value_learning_rate: of the value network's encoder and decoder, likewise.
      value_head_learning_rate: of the value head, in units of normalised reward: about the most by which one
        step moves V. The head starts at zero, so its step is not scaled by the parameter.
      warmup_steps: steps over which the rates grow linearly from 0.
      decay_rate: exponent of the second moment's decay.
    """

    policy_learning_rate: float = 1e-4
    value_learning_rate: float = 1e-4
    value_head_learning_rate: float = 1e-2
    warmup_steps: int = 150
    decay_rate: float = 0.8

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        for field in dataclasses.fields(self):
            whole = field.name == "warmup_steps"
            check_number(f"Adafactor.{field.name}", getattr(self, field.name), whole=whole)

    def schedules(self) -> dict[str, Schedule]:
        """Learning rate by step of "policy", "value" and "value_head"."""
        peaks = {
            "policy": self.policy_learning_rate,
            "value": self.value_learning_rate,
            "value_head": self.value_head_learning_rate,
        }
        return {
            name: optax.linear_schedule(0.0, peak, self.warmup_steps)
            if self.warmup_steps
            else optax.constant_schedule(peak)
            for name, peak in peaks.items()
        }

    def transforms(self) -> dict[str, optax.GradientTransformation]:
        """The gradient transformation of each part of the state: "policy" and "value"."""
        schedules = self.schedules()
        head = optax.chain(
            optax.adafactor(
                schedules["value_head"],
                decay_rate=self.decay_rate,
                multiply_by_parameter_scale=False,
            ),
            optax.stateless(_divide_by_fan_in),
        )
        body = optax.adafactor(schedules["value"], decay_rate=self.decay_rate)
        return {
            "policy": optax.adafactor(schedules["policy"], decay_rate=self.decay_rate),
            "value": optax.partition({"head": head, "body": body}, _value_labels),
        }


def _divide_by_fan_in(updates: Any, params: Any) -> Any:
    # Adafactor moves every weight by about the learning rate; the head adds up emb_dim of them.
    del params
    return jax.tree.map(lambda u: u / u.shape[0] if u.ndim == 2 else u, updates)


def _value_labels(params: Any) -> Any:
    return {
        name: jax.tree.map(lambda _, n=name: "head" if n == "value_head" else "body", tree)
        for name, tree in params.items()
    }
