"""The paper's T5-L and T5-XL runs: states of full depth by their shapes, and a step of full width at one layer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dro_jax.cli import configuration
from dro_jax.cli import train as train_module
from dro_jax.training import loop, partitioning, step, train_state

ARMS = sorted(
    f"{folder.name}/{path.stem}"
    for folder in (configuration.shipped_configs() / "experiments").iterdir()
    if folder.name != "miniature"
    for path in folder.glob("*.gin")
    if path.stem != "base"
)
# google/flan-t5-large and -xl: the table, both stacks and the logits' own table.
PARAMETERS = {"t5_large": 783_150_080, "t5_xl": 2_849_757_184}


def parts_of(name, devices=None, **changes):
    configuration.load(
        [f"experiments/{name}.gin"], ["FEEDBACK_FILE = 'feedback.jsonl'", "MODEL_DIR = 'out'"]
    )
    bound = configuration.arguments(train_module.train)
    algorithm = bound["algorithm"]
    model = dataclasses.replace(
        bound["model"], reserved_entry=algorithm.needs.value == "policy", **changes
    )
    has_value = algorithm.needs.value == "network"
    layout = layout_of(model, bound["optimizer"], has_value, bound["rules"], devices)
    return model, algorithm, bound["optimizer"], layout


@functools.cache
def layout_of(model, optimizer, has_value, rules, devices):
    """Many arms have the same, and it takes seconds."""
    return train_state.make_layout(
        model, optimizer.transforms(), has_value=has_value, mesh=rules.mesh(devices), rules=rules
    )


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ARMS)
def test_states_of_full_depth(name):
    model, algorithm, _, layout = parts_of(name)
    shapes, shardings = layout.shapes, layout.shardings
    published = PARAMETERS[name.split("/")[0]]
    assert count(shapes.policy) == published
    assert (model.num_encoder_layers, model.num_decoder_layers) == (24, 24)
    if algorithm.needs.value == "network":
        # A head instead of the logits' table.
        head = model.emb_dim + 1
        assert count(shapes.value) == published - model.vocab_size * model.emb_dim + head
    else:
        assert not shapes.value
    # Adafactor keeps a row and a column of a kernel, not the kernel.
    assert count(shapes.opt_state) < 0.01 * published * (2 if shapes.value else 1)
    on_a_chip = sum(
        int(np.prod(sharding.shard_shape(leaf.shape)))
        for leaf, sharding in zip(
            jax.tree.leaves(shapes.policy), jax.tree.leaves(shardings.policy), strict=True
        )
    )
    assert on_a_chip < 1.01 * published / jax.device_count()


def a_kernel(state):
    return state.policy["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]


@pytest.mark.parametrize("name", ["t5_large/dro_v", "t5_xl/kto"])
def test_a_step_of_full_width(name):
    # On eight devices that are one machine the gathered weights would be there eight times.
    one = (jax.devices()[0],)
    smaller = {"num_encoder_layers": 1, "num_decoder_layers": 1, "vocab_size": 1024}
    model, algorithm, optimizer, layout = parts_of(name, one, **smaller)
    transforms = optimizer.transforms()
    reference = train_state.init_reference(model, 0, layout)
    state = train_state.init_state(model, transforms, reference, 0, layout)
    rng = np.random.default_rng(0)
    rows = 2
    tokens = rng.integers(2, 1000, (3, rows, 4), np.int32)
    decoder = {
        "input_tokens": np.pad(tokens[1], ((0, 0), (1, 0)))[:, :-1],
        "target_tokens": tokens[1],
        "loss_weights": np.ones((rows, 4), np.int32),
    }
    batch = {"encoder_input_tokens": tokens[0]}
    batch |= {f"decoder_{name}": array for name, array in decoder.items()}
    batch |= {
        "rewards": rng.normal(size=(rows, 1)).astype(np.float32),
        "reward_weights": np.ones((rows, 1), np.float32),
    }
    if algorithm.needs.mismatched:
        batch |= {f"mismatched_decoder_{name}": np.roll(a, 1, 0) for name, a in decoder.items()}
    train_step = step.make_train_step(model, algorithm, transforms, optimizer.schedules(), layout)
    before = np.asarray(a_kernel(state))
    placed = loop.to_devices(batch, partitioning.batch_sharding(layout.mesh))
    state, metrics = train_step(state, reference, placed)
    scalars = jax.device_get(metrics)
    loop.check_finite([scalars], 0)
    assert scalars["kl/log_ratio_std"] < 1e-3
    assert scalars["grad_norm/policy"] > 0
    # The warm-up begins at a rate of 0.
    state, _ = train_step(state, reference, placed)
    assert int(state.step) == 2
    assert not np.array_equal(np.asarray(a_kernel(state)), before)
