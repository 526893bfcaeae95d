"""The parameters that a T5 has to have, and how another model's are told from them."""

from collections.abc import Mapping

import jax
from flax.core import meta
from flax.traverse_util import flatten_dict

from dro_jax.errors import UsageError
from dro_jax.networks import T5Config
from dro_jax.training import train_state

Shape = tuple[int, ...]


def shapes(config: T5Config, *, value: bool = False) -> dict[str, Shape]:
    """Shape of every parameter of the policy, or of the value network, by its path with slashes."""
    init = train_state.init_value if value else train_state.init_policy
    tree = meta.unbox(jax.eval_shape(lambda: init(config, 0)))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def refuse_differences(
    where: object, found: Mapping[str, Shape], needed: Mapping[str, Shape], model: str, advice: str
) -> None:
    """Raises UsageError naming the first three parameters that differ, with both shapes.

    Args:
      where: what holds the parameters.
      found: their shapes.
      needed: the shapes they must have; nothing may be missing and nothing left over.
      model: what has those shapes, as in "the T5 in config.json".
      advice: what to do.
    """
    differing = [name for name in needed if found.get(name) != needed[name]]
    differing += sorted(found.keys() - needed.keys())
    if not differing:
        return
    told = ", ".join(
        f"{name} {_told(found.get(name))} there and {_told(needed.get(name))} in such a model"
        for name in differing[:3]
    )
    raise UsageError(
        f"{where}: {len(differing)} parameters are not those of {model}: {told}; {advice}"
    )


def _told(shape: Shape | None) -> str:
    return "absent" if shape is None else str(list(shape))
