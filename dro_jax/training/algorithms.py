"""Which networks a method needs and which objective it minimises: the link from gin to objectives."""

import dataclasses
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from dro_jax import objectives
from dro_jax.errors import check_choice, check_number

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Examples:
    """What an objective may look at, one entry an example, all float32 [B, N].

    Attributes:
      policy_log_prob: log pi(y|x), summed over the response's tokens, nats.
      reference_log_prob: log pi_ref(y|x), nats; None for methods without a reference.
      value: V(x) in units of normalised reward; None for methods without a value.
      reward: r(x, y), normalised.
      weights: 1 for a real example, 0 for padding.
      target_tokens: number of target tokens, end-of-sequence included.
    """

    policy_log_prob: Array
    reference_log_prob: Array | None
    value: Array | None
    reward: Array
    weights: Array
    target_tokens: Array


jax.tree_util.register_dataclass(Examples)


class Algorithm(Protocol):
    """A method of alignment: what it needs, and its loss on a batch of examples."""

    name: ClassVar[str]
    has_value: ClassVar[bool]
    has_reference: ClassVar[bool]

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """The scalar to differentiate and what to report, means over the real examples."""


@dataclasses.dataclass(frozen=True)
class DroV:
    """DRO-V (Algorithm 1): policy and value network trained with the two gradients of eq. 4.

    Attributes:
      tau: strength of the regularisation towards the reference, units of normalised reward per nat.
      values: "multiple", one value an example, or "single", their mean over the batch for all of them (the
        paper's double net with multiple or a single value).
    """

    tau: float = 1.0
    values: Literal["multiple", "single"] = "multiple"

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        if not isinstance(self.tau, jax.Array):  # A traced tau has no value yet.
            check_number("TAU (DroV.tau)", self.tau, above=0)
        check_choice("DroV.values", self.values, ("multiple", "single"))

    name: ClassVar[str] = "dro_v"
    has_value: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.dro_v_loss`."""
        assert examples.value is not None
        assert examples.reference_log_prob is not None
        arrays = {
            "policy_log_prob": examples.policy_log_prob,
            "reference_log_prob": examples.reference_log_prob,
            "value": examples.value,
            "reward": examples.reward,
            "weights": examples.weights,
        }
        mean_value = None
        if self.values == "single":
            mean_value = objectives.weighted_mean(examples.value, examples.weights)
        loss, metrics = objectives.dro_v_loss(**arrays, tau=self.tau, mean_value=mean_value)
        if mean_value is not None:
            arrays["value"] = jnp.full_like(examples.value, mean_value)
        return loss, metrics | objectives.alignment_diagnostics(**arrays, tau=self.tau)


@dataclasses.dataclass(frozen=True)
class DroP:
    """DRO-P (eq. 15): the policy alone, the variance of r - tau h over the batch.

    Attributes:
      tau: units of normalised reward per nat.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        """Raises UsageError unless tau is positive."""
        if not isinstance(self.tau, jax.Array):  # A traced tau has no value yet.
            check_number("TAU (DroP.tau)", self.tau, above=0)

    name: ClassVar[str] = "dro_p"
    has_value: ClassVar[bool] = False
    has_reference: ClassVar[bool] = True

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.dro_p_loss`."""
        assert examples.reference_log_prob is not None
        arrays = {
            "policy_log_prob": examples.policy_log_prob,
            "reference_log_prob": examples.reference_log_prob,
            "reward": examples.reward,
            "weights": examples.weights,
        }
        loss, metrics = objectives.dro_p_loss(**arrays, tau=self.tau)
        return loss, metrics | objectives.alignment_diagnostics(**arrays, tau=self.tau)


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on the completions: how a reference is made, and a baseline."""

    name: ClassVar[str] = "sft"
    has_value: ClassVar[bool] = False
    has_reference: ClassVar[bool] = False

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.sft_loss`."""
        return objectives.sft_loss(
            policy_log_prob=examples.policy_log_prob,
            target_tokens=examples.target_tokens,
            weights=examples.weights,
        )
