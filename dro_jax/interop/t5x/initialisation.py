"""How an alignment run inside T5X starts: policy, value network and reference from one ordinary checkpoint."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from t5x import state_utils

from dro_jax.errors import UsageError
from dro_jax.interop import parameter_shapes
from dro_jax.interop.t5x import checkpoints
from dro_jax.interop.t5x.alignment import REFERENCE, VALUE

Tree = Mapping[str, Any]


def from_policy(
    checkpoint: Tree, state: Tree, *, path: str, is_resuming: bool = False
) -> dict[str, Any] | Tree:
    """A state transformation of T5X's RestoreCheckpointConfig: every part takes the checkpoint's parameters.

    What the checkpoint has not, the value head and the optimiser's state, is left for `fallback_to_scratch`; the step
    is 0.

    Args:
      checkpoint: what T5X found there: arrays, TensorStore's specifications, or Orbax's metadata.
      state: shapes of the state to restore.
      path: of the checkpoint.
      is_resuming: whether `checkpoint` is this run's own, and stays as it is.

    Returns:
      What T5X is to restore, under the names of `state`.

    Raises:
      UsageError: if the checkpoint is damaged or of another model than `state`.
    """
    if is_resuming:
        return checkpoint
    found = checkpoints.find(path)
    if found is None:
        raise UsageError(f"{path}: is no checkpoint of T5X; give a checkpoint_<step>")
    stored = checkpoints.open_model(found).policy
    flat, wanted = (state_utils.flatten_state_dict(tree) for tree in (checkpoint, state))
    needed = {
        name.removeprefix("target/"): tuple(leaf.shape)
        for name, leaf in wanted.items()
        if re.match(rf"target/(?!{VALUE}/|{REFERENCE}/)", name)
    }
    parameter_shapes.refuse_differences(
        path,
        {name: array.shape for name, array in stored.items()},
        needed,
        "network.T5Config",
        "give the gin file of the checkpoint's model",
    )

    @functools.cache
    def read(name: str) -> np.ndarray:
        return stored[name].read()

    taken = {}
    for name in wanted:
        own = re.sub(rf"^target/({VALUE}/|{REFERENCE}/)?", "", name)
        if own not in needed or not name.startswith("target/"):
            continue
        leaf = flat.get(f"target/{own}")
        # Orbax reads by the name in its tree and cannot give one array twice; nor has a scanned checkpoint these names.
        elsewhere = hasattr(leaf, "value_type") and name != f"target/{own}"
        taken[name] = read(own) if leaf is None or elsewhere else leaf
    return unflatten_dict(taken, sep="/")
