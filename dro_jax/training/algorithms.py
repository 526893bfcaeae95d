"""What each method needs of the networks and which objective it minimises: the link from gin to objectives."""

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
      policy_log_prob: log pi(y|x), summed over the response's tokens (their mean, where the method asks for
        it), nats.
      reference_log_prob: log pi_ref(y|x), likewise; None for methods without a reference.
      value: V(x) in units of normalised reward, its mean over the response's positions where values are per
        token; None for methods without a value.
      value_variance: variance of V over the response's positions; None unless values are per token.
      mismatched_policy_log_prob: log pi(y'|x) of the response y' to another prompt, without gradient; None
        for methods without it.
      mismatched_reference_log_prob: log pi_ref(y'|x), likewise.
      reward: r(x, y), normalised.
      weights: 1 for a real example, 0 for padding.
      target_tokens: number of target tokens, end-of-sequence included.
    """

    policy_log_prob: Array
    reference_log_prob: Array | None
    value: Array | None
    value_variance: Array | None
    mismatched_policy_log_prob: Array | None
    mismatched_reference_log_prob: Array | None
    reward: Array
    weights: Array
    target_tokens: Array


jax.tree_util.register_dataclass(Examples)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method needs beside log pi(y|x).

    Attributes:
      reference: log pi_ref(y|x).
      value: V(x), from a "network" of its own or as a logit of the "policy"; None for neither.
      per_token_values: V at every position of the response instead of one.
      token_mean: log-probabilities as means over the tokens instead of sums.
      mismatched: the log-probabilities of another prompt's response.
      pairs: batches of responses to one prompt, two by two.
      contrasts: pairs of which one has the greater reward.
    """

    reference: bool = True
    value: Literal["network", "policy"] | None = None
    per_token_values: bool = False
    token_mean: bool = False
    mismatched: bool = False
    pairs: bool = False
    contrasts: bool = False


class Algorithm(Protocol):
    """A method of alignment: what it needs, and its loss on a batch of examples."""

    @property
    def name(self) -> str:
        """What a checkpoint belongs to: methods of one name have the same training state."""

    @property
    def needs(self) -> Needs:
        """What the training step has to compute for it."""

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """The scalar to differentiate and what to report, means over the real examples."""

    def loss_weights(self, weights: Array, target_tokens: Array) -> Array | None:
        """The share [B, N] each example has in the mean that is the loss, where that is all an example depends
        on of the others; None where its gradient needs more of the batch.
        """


@dataclasses.dataclass(frozen=True)
class _Regularised:
    """A method that holds the policy near the reference.

    Attributes:
      tau: strength of the regularisation, units of normalised reward per nat; beta of KTO and the pairwise
        methods.
      log_probs: "sum" over the response's tokens, as the paper has it, or their "mean", which makes tau
        mean something else for every length.
    """

    tau: float = 1.0
    log_probs: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        name = type(self).__name__
        if not isinstance(self.tau, jax.Array):  # A traced tau has no value yet.
            check_number(f"TAU ({name}.tau)", self.tau, above=0)
        check_choice(f"{name}.log_probs", self.log_probs, ("sum", "mean"))

    @property
    def needs(self) -> Needs:
        """The reference, and log-probabilities as asked for."""
        return Needs(token_mean=self.log_probs == "mean")

    def loss_weights(self, weights: Array, target_tokens: Array) -> Array | None:
        """Most methods look at the batch as a whole."""
        del weights, target_tokens
        return None

    def _diagnostics(self, examples: Examples, value: Array | None = None) -> Metrics:
        return objectives.alignment_diagnostics(**_arrays(examples), value=value, tau=self.tau)


@dataclasses.dataclass(frozen=True)
class DroV(_Regularised):
    """DRO-V (Algorithm 1): policy and value trained with the two gradients of eq. 4.

    Attributes:
      values: "multiple", one value an example; "single", their mean over the batch for all of them;
        "per_token", one at every position of the response, a diagnostic: such a V has seen y.
      networks: "double", a value network of its own, or "single", V as the logit of the last vocabulary
        entry, which is then no token.
    """

    values: Literal["multiple", "single", "per_token"] = "multiple"
    networks: Literal["double", "single"] = "double"

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        super().__post_init__()
        check_choice("DroV.values", self.values, ("multiple", "single", "per_token"))
        check_choice("DroV.networks", self.networks, ("double", "single"))

    @property
    def name(self) -> str:
        """A single net has another training state."""
        return "dro_v" if self.networks == "double" else "dro_v_single_net"

    @property
    def needs(self) -> Needs:
        """Reference and values."""
        return dataclasses.replace(
            super().needs,
            value="network" if self.networks == "double" else "policy",
            per_token_values=self.values == "per_token",
        )

    def loss_weights(self, weights: Array, target_tokens: Array) -> Array | None:
        """Each example has its own V, unless there is a single one."""
        del target_tokens
        return None if self.values == "single" else weights

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.dro_v_loss`."""
        value = examples.value
        assert value is not None
        mean_value = None
        if self.values == "single":
            mean_value = objectives.weighted_mean(value, examples.weights)
        loss, metrics = objectives.dro_v_loss(
            **_arrays(examples),
            value=value,
            value_variance=examples.value_variance,
            mean_value=mean_value,
            tau=self.tau,
        )
        if mean_value is not None:
            value = jnp.full_like(value, mean_value)
        return loss, metrics | self._diagnostics(examples, value)


@dataclasses.dataclass(frozen=True)
class DroP(_Regularised):
    """DRO-P (eq. 15): the policy alone, the variance of r - tau h over the batch."""

    name: ClassVar[str] = "dro_p"

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.dro_p_loss`."""
        loss, metrics = objectives.dro_p_loss(**_arrays(examples), tau=self.tau)
        return loss, metrics | self._diagnostics(examples)


@dataclasses.dataclass(frozen=True)
class TwoSampleDro(_Regularised):
    """Two-sample DRO (appendix B): the policy alone, on pairs of responses to one prompt."""

    name: ClassVar[str] = "dro_two_sample"

    @property
    def needs(self) -> Needs:
        """The reference, and pairs."""
        return dataclasses.replace(super().needs, pairs=True)

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.two_sample_dro_loss`."""
        loss, metrics = objectives.two_sample_dro_loss(**_pairs(examples), tau=self.tau)
        return loss, metrics | self._diagnostics(examples)


@dataclasses.dataclass(frozen=True)
class Kto(_Regularised):
    """KTO (arXiv 2402.01306), as the DRO paper runs it by default.

    Attributes:
      desirable: "above_batch_mean", responses with a reward above the batch's mean (the DRO paper), or
        "above_dataset_mean", above the training split's, which for labels are those with a thumb up
        (KTO's own paper).
      lambda_desirable: weight of desirable responses.
      lambda_undesirable: weight of undesirable responses.
    """

    desirable: Literal["above_batch_mean", "above_dataset_mean"] = "above_batch_mean"
    lambda_desirable: float = 1.0
    lambda_undesirable: float = 1.0

    name: ClassVar[str] = "kto"

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        super().__post_init__()
        check_choice("Kto.desirable", self.desirable, ("above_batch_mean", "above_dataset_mean"))
        check_number("Kto.lambda_desirable", self.lambda_desirable)
        check_number("Kto.lambda_undesirable", self.lambda_undesirable)

    @property
    def needs(self) -> Needs:
        """The reference, and mismatched responses."""
        return dataclasses.replace(super().needs, mismatched=True)

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.kto_loss`; the mean of normalised rewards is 0."""
        by_dataset = self.desirable == "above_dataset_mean"
        loss, metrics = objectives.kto_loss(
            **_arrays(examples),
            tau=self.tau,
            mismatched_policy_log_prob=examples.mismatched_policy_log_prob,
            mismatched_reference_log_prob=examples.mismatched_reference_log_prob,
            desirable=examples.reward > 0 if by_dataset else None,
            lambda_desirable=self.lambda_desirable,
            lambda_undesirable=self.lambda_undesirable,
            dataset_mean_reward=0.0,
        )
        return loss, metrics | self._diagnostics(examples)


@dataclasses.dataclass(frozen=True)
class Pairwise(_Regularised):
    """DPO, IPO or SLiC on pairs of responses to one prompt: which has the greater reward.

    Attributes:
      kind: "dpo", "ipo" or "slic".
    """

    kind: Literal["dpo", "ipo", "slic"] = "dpo"

    name: ClassVar[str] = "pairwise"

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        super().__post_init__()
        check_choice("Pairwise.kind", self.kind, ("dpo", "ipo", "slic"))

    @property
    def needs(self) -> Needs:
        """The reference, and pairs."""
        return dataclasses.replace(super().needs, pairs=True, contrasts=True)

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.pairwise_loss`."""
        loss, metrics = objectives.pairwise_loss(**_pairs(examples), tau=self.tau, kind=self.kind)
        return loss, metrics | self._diagnostics(examples)


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on the completions: how a reference is made, and a baseline."""

    name: ClassVar[str] = "sft"

    @property
    def needs(self) -> Needs:
        """Nothing else."""
        return Needs(reference=False)

    def loss_weights(self, weights: Array, target_tokens: Array) -> Array:
        """The mean is over tokens."""
        return weights * target_tokens

    def loss(self, examples: Examples) -> tuple[Array, Metrics]:
        """See `dro_jax.objectives.sft_loss`."""
        return objectives.sft_loss(
            policy_log_prob=examples.policy_log_prob,
            target_tokens=examples.target_tokens,
            weights=examples.weights,
        )


def _arrays(examples: Examples) -> dict[str, Array]:
    assert examples.reference_log_prob is not None
    return {
        "policy_log_prob": examples.policy_log_prob,
        "reference_log_prob": examples.reference_log_prob,
        "reward": examples.reward,
        "weights": examples.weights,
    }


def _pairs(examples: Examples) -> dict[str, Array]:
    # The data put the responses to one prompt next to each other.
    return {name: array.reshape(-1, 2) for name, array in _arrays(examples).items()}
