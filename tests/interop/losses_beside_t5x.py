"""Trains with the trainer of dro_jax on the batches of a finished `t5x.train` run, and compares the two.

    python tests/interop/losses_beside_t5x.py --gin_file=… --gin.MODEL_DIR=… …

takes the flags of the `t5x.train` run, which has to have had a fixed train/utils.DatasetConfig.seed and
train_script.train.stats_period = 1. Prints JSON: what every step logged, T5X's and ours, and the greatest difference of
the parameters after the last one. test_t5x_training.py says what they have to be.
"""

import json
import sys
from typing import Any

import gin
import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from t5x import gin_utils, utils
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from dro_jax.interop.t5x import checkpoints
from dro_jax.training import partitioning, step, train_state

METRICS = ("loss", "kl/log_ratio_std", "value/mean")


def train(
    *,
    model: Any,
    train_dataset_cfg: Any,
    checkpoint_cfg: Any,
    model_dir: str,
    total_steps: int,
    **_: Any,
) -> None:
    """Stands for `t5x.train.train`, which the gin files bind."""
    reference = read(checkpoint_cfg.restore.path)["policy"]
    config, algorithm = model._config, model._algorithm
    optimizer = model.optimizer_def.adafactor
    rules = partitioning.Partitioning()
    transforms = optimizer.transforms()
    layout = train_state.make_layout(
        config,
        transforms,
        has_value=algorithm.needs.value == "network",
        mesh=rules.mesh(),
        rules=rules,
    )
    state = train_state.init_state(config, transforms, reference, 0, layout)
    train_step = step.make_train_step(config, algorithm, transforms, optimizer.schedules(), layout)
    batches = utils.get_dataset(train_dataset_cfg, 0, 1, model.FEATURE_CONVERTER_CLS)
    ours: dict[str, list[float]] = {}
    for batch in batches.take(total_steps).as_numpy_iterator():
        state, metrics = train_step(state, reference, jax.tree.map(np.asarray, batch))
        for name in set(METRICS) & set(metrics):
            ours.setdefault(name, []).append(float(metrics[name]))
    theirs = events(f"{model_dir}/train")
    saved = read(f"{model_dir}/checkpoint_{total_steps}")
    trained = {"policy": state.policy, "value": state.value}
    print(
        json.dumps(
            {
                "ours": ours,
                "t5x": {name: theirs[name] for name in ours},
                "learning_rate": theirs["learning_rate"],
                "parameters": {
                    name: float(
                        max(
                            np.abs(np.asarray(one) - other).max()
                            for one, other in zip(
                                jax.tree.leaves(tree), jax.tree.leaves(saved[name]), strict=True
                            )
                        )
                    )
                    for name, tree in trained.items()
                    if tree
                },
            }
        )
    )


def read(path: str) -> dict[str, Any]:
    """Parameter trees of a T5X checkpoint."""
    found = checkpoints.find(path)
    assert found is not None, path
    model = checkpoints.open_model(found)
    return {
        name: unflatten_dict({key: array.read() for key, array in arrays.items()}, sep="/")
        for name, arrays in (("policy", model.policy), ("value", model.value))
    }


def events(folder: str) -> dict[str, list[float]]:
    """What a run wrote for TensorBoard, by step."""
    accumulator = EventAccumulator(folder, size_guidance={"tensors": 0})
    accumulator.Reload()
    found = {}
    for tag in accumulator.Tags()["tensors"]:
        arrays = [tensor_util.make_ndarray(e.tensor_proto) for e in accumulator.Tensors(tag)]
        if arrays[0].dtype == np.float32:
            found[tag] = [float(array) for array in arrays]
    return found


if __name__ == "__main__":
    given = [a.removeprefix("--") for a in sys.argv[1:]]
    flags: dict[str, list[str]] = {"gin_file": [], "gin_search_paths": [], "bindings": []}
    for flag in given:
        name, _, flag_value = flag.partition("=")
        if name.startswith("gin."):
            flags["bindings"].append(f"{name.removeprefix('gin.')} = {flag_value}")
        else:
            flags[name].append(flag_value)
    folders = [*flags["gin_search_paths"], gin_utils.__file__.rpartition("/t5x/")[0]]
    gin_utils.parse_gin_flags(folders, flags["gin_file"], flags["bindings"])
    gin.get_configurable(train)()
