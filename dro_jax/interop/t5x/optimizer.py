"""Adafactor for T5X, policy and value network each with a learning rate of its own."""

from typing import Any

import jax
import optax
from flax.core import FrozenDict, freeze, unfreeze
from flax.serialization import to_state_dict
from t5x import optimizers

from dro_jax.interop.t5x.alignment import REFERENCE, VALUE, parts_of
from dro_jax.training.optimizers import Adafactor, Schedule
from dro_jax.training.partitioning import specs_like_parameters


class AlignmentOptimizer(optimizers.OptaxWrapper):
    """The optimiser of `dro_jax train` for the parameters of an `AlignmentModel`.

    T5X hands one learning rate to every member of its MultiOptimizer; here each part follows its own schedule, and what
    T5X's `learning_rate_fn` gives is only logged. The reference has no state and stays as it is.
    """

    def __init__(self, adafactor: Adafactor) -> None:
        """Takes the rates and schedules of both parts."""
        self.adafactor = adafactor
        self._transforms = adafactor.transforms()
        super().__init__(optax.identity())

    def init_state(self, params: Any) -> optimizers.OptimizerState:
        """States of policy and value network."""
        states = {
            name: self._transforms[name].init(tree) for name, tree in _trained(params).items()
        }
        return optimizers.OptimizerState(step=0, param_states=states)

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: optimizers.OptimizerState, grads: Any
    ) -> tuple[Any, optimizers.OptimizerState]:
        """One step of both parts."""
        del hyper_params
        trained, gradients = _trained(params), _trained(grads)
        states = {}
        for name, tree in trained.items():
            updates, states[name] = self._transforms[name].update(
                gradients[name], state.param_states[name], tree
            )
            trained[name] = optax.apply_updates(tree, updates)
        updated: Any = {**trained["policy"], REFERENCE: unfreeze(params)[REFERENCE]}
        if VALUE in trained:
            updated[VALUE] = trained[VALUE]
        if isinstance(params, FrozenDict):
            updated = freeze(updated)
        return updated, optimizers.OptimizerState(step=state.step + 1, param_states=states)

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
        """Names of the axes of the whole state: those of the parameter that a moment belongs to."""
        shapes, specs = _trained(optimizer.target), _trained(param_logical_axes)
        states = {
            name: specs_like_parameters(state, shapes[name], specs[name])
            for name, state in optimizer.state.param_states.items()
        }
        axes = jax.tree.map(lambda _: None, optimizer.state_dict())
        axes["target"] = unfreeze(param_logical_axes)
        axes["state"]["param_states"] = to_state_dict(states)
        return optimizer.restore_state(axes)


def _trained(params: Any) -> dict[str, Any]:
    policy, value, _ = parts_of(params)
    return {"policy": policy, "value": value} if value else {"policy": policy}


def policy_learning_rate(adafactor: Adafactor) -> Schedule:
    """The policy's learning rate by step, for T5X's log."""
    return adafactor.schedules()["policy"]
