"""The mesh, its messages, where parameters and moments lie, and the same training on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dro_jax.errors import UsageError
from dro_jax.training import partitioning, train_state
from dro_jax.training.optimizers import Adafactor
from dro_jax.training.partitioning import MESH_AXES, Partitioning


@pytest.fixture(scope="module")
def cube():
    return Partitioning(data=2, fsdp=2, model=2).mesh()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, 1), (1, 8, 1)),
        ((8, 1, -1), (8, 1, 1)),
    ],
)
def test_one_axis_may_take_the_devices_that_the_others_leave(sizes, shape):
    mesh = Partitioning(*sizes).mesh()
    assert dict(mesh.shape) == dict(zip(MESH_AXES, shape, strict=True))
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), r"mesh \{'data': 0, 'fsdp': 1, 'model': 1\}: give positive sizes, and -1 for"),
        (
            (1, -2, 1),
            r"mesh \{'data': 1, 'fsdp': -2, 'model': 1\}: give positive sizes, and -1 for",
        ),
        ((-1, -1, 1), r"-1 for at most one axis \(Partitioning.data, .fsdp, .model\)"),
        ((2, 2, 1), r"mesh .*'model': 1\} does not fit 8 devices: set Partitioning.data, .fsdp"),
        ((-1, 3, 1), r"mesh \{'data': -1, 'fsdp': 3, 'model': 1\} does not fit 8 devices"),
        ((16, 1, 1), r"mesh \{'data': 16, .* does not fit 8 devices"),
        ((-1, 16, 1), r"mesh .* does not fit 8 devices: .* product is the device count"),
    ],
)
def test_an_impossible_mesh_is_one_clear_line(sizes, message):
    with pytest.raises(UsageError, match=message) as raised:
        Partitioning(*sizes).mesh()
    assert "\n" not in str(raised.value)


def test_rows_must_divide_over_data_and_fsdp_together(cube):
    for size in (4, 32):
        partitioning.check_batch_size(size, cube, Partitioning())
    for size in (6, 2, 0, -4):
        with pytest.raises(UsageError, match=rf"BATCH_SIZE {size} does not divide into 4 data"):
            partitioning.check_batch_size(size, cube, Partitioning())


def test_every_microbatch_must_divide_too(cube):
    partitioning.check_batch_size(16, cube, Partitioning(), microbatches=4)
    with pytest.raises(UsageError, match=r"BATCH_SIZE 8 .* in 4 microbatches: .* multiple of 16"):
        partitioning.check_batch_size(8, cube, Partitioning(), microbatches=4)
    with pytest.raises(UsageError, match="MICROBATCHES is 0: give a whole number"):
        partitioning.check_batch_size(8, cube, Partitioning(), microbatches=0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embd", "fsdp"),), "there is no logical axis 'embd'; there are batch, vocab, embed"),
        ((("embed", "fsd"),), "'embed' goes to 'fsd', which is no mesh axis; there are data, fsdp"),
        ((("batch", ("data", "x")),), "'batch' goes to 'x', which is no mesh axis"),
        (("embed",), "write \\(\\('embed', 'fsdp'\\), …\\)"),
        (3, "rules is 3: write"),
    ],
)
def test_a_rule_of_an_axis_that_is_not_there_is_one_clear_line(rules, message):
    with pytest.raises(UsageError, match=message) as raised:
        Partitioning(rules=rules)
    assert "\n" not in str(raised.value)


def test_an_axis_that_its_mesh_axis_does_not_divide_stays_whole(cube):
    shape = (3, 4)
    boxed = {
        "w": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), ("heads", "embed"))
    }
    got = partitioning.parameter_shardings(boxed, cube, Partitioning())
    assert got["w"].spec == P(None, "fsdp")


def test_rows_lie_where_the_rule_of_the_batch_says(cube):
    rules = (("batch", "data"),)
    array = jax.device_put(np.arange(4.0), partitioning.batch_sharding(cube, rules))
    assert {tuple(shard.data.tolist()) for shard in array.addressable_shards} == {(0, 1), (2, 3)}
    partitioning.check_batch_size(2, cube, Partitioning(rules=rules))


def test_every_parameter_lies_by_the_rules_of_its_logical_axes(bench):
    layout = bench((2, 2, 2)).layout
    assert layout.shardings.step.spec == P()
    shapes = flatten_dict(layout.shapes.value | layout.shapes.policy, sep="/")
    got = flatten_dict(layout.shardings.value | layout.shardings.policy, sep="/")
    by_name = {
        "embedding": P("model", "fsdp"),
        "query/kernel": P("fsdp", "model"),
        "key/kernel": P("fsdp", "model"),
        "value/kernel": P("fsdp", "model"),
        "out/kernel": P("model", "fsdp"),
        "wi_0/kernel": P("fsdp", "model"),
        "wi_1/kernel": P("fsdp", "model"),
        "wo/kernel": P("model", "fsdp"),
        "scale": P("fsdp"),
        "relpos_bias/rel_embedding": P("model", None),
        "logits_dense/kernel": P("fsdp", "model"),
        "value_head/kernel": P("fsdp", None),
        "value_head/bias": P(None),
    }
    assert len(got) > 30
    for path, sharding in got.items():
        want = [spec for name, spec in by_name.items() if path.endswith(f"/{name}") or path == name]
        assert len(want) == 1, path
        assert sharding.is_equivalent_to(
            NamedSharding(layout.mesh, want[0]), len(shapes[path].shape)
        ), (path, sharding.spec)


def test_a_rule_can_be_changed_and_a_missing_one_leaves_the_axis_whole(bench, cube):
    boxed = {
        "w": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 4), jnp.float32), ("embed", "mlp"))
    }
    for rules, spec in [
        ((("embed", "model"), ("mlp", None)), P("model", None)),
        ((("mlp", "fsdp"), ("embed", None)), P(None, "fsdp")),
    ]:
        got = partitioning.parameter_shardings(boxed, cube, Partitioning(rules=rules))
        assert got["w"].is_equivalent_to(NamedSharding(cube, spec), 2)


def test_factored_moments_lie_as_their_parameter_less_the_axis_that_was_averaged(bench, cube):
    small = bench().config
    config = dataclasses.replace(small, emb_dim=128, mlp_dim=256, vocab_size=512, head_dim=64)
    transforms = Adafactor().transforms()
    layout = train_state.make_layout(
        config, transforms, has_value=True, mesh=cube, rules=Partitioning()
    )

    def moments(part, *path):
        """Shapes and specs of v_row, v_col and v of one parameter."""
        found = {}
        leaves = jax.tree_util.tree_leaves_with_path(layout.shapes.opt_state[part])
        placed = jax.tree.leaves(layout.shardings.opt_state[part])
        for (keys, leaf), sharding in zip(leaves, placed, strict=True):
            names = [getattr(k, "key", getattr(k, "name", None)) for k in keys]
            if tuple(names[-len(path) :]) == path:
                found[names[-len(path) - 1]] = (leaf.shape, tuple(sharding.spec))
        return found

    one = ((1,), ())
    mlp = ("encoder", "layers_0", "mlp")
    for part in ("policy", "value"):
        # [embed 128 over fsdp, mlp 256 over model]: v_row averages over the longer axis.
        assert moments(part, *mlp, "wi_0", "kernel") == {
            "v_row": ((128,), ("fsdp",)),
            "v_col": ((256,), ("model",)),
            "v": one,
        }
        assert moments(part, *mlp, "wo", "kernel") == {
            "v_row": ((128,), ("fsdp",)),
            "v_col": ((256,), ("model",)),
            "v": one,
        }
        assert moments(part, "token_embedder", "embedding") == {
            "v_row": ((128,), ("fsdp",)),
            "v_col": ((512,), ("model",)),
            "v": one,
        }
        # Square, so that the shape does not tell which axis is left.
        query = moments(part, "encoder", "layers_0", "attention", "query", "kernel")
        assert query == {"v_row": ((128,), ("fsdp",)), "v_col": ((128,), ("model",)), "v": one}
        out = moments(part, "encoder", "layers_0", "attention", "out", "kernel")
        assert out == {"v_row": ((128,), ("model",)), "v_col": ((128,), ("fsdp",)), "v": one}
        # Not factored: the moment has the parameter's own shape.
        scale = moments(part, "encoder", "encoder_norm", "scale")
        assert scale == {"v_row": one, "v_col": one, "v": ((128,), ("fsdp",))}
    assert moments("value", "value_head", "kernel")["v"] == ((128, 1), ("fsdp", None))


def test_states_beside_no_parameter_are_whole_everywhere(cube):
    parameters = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    shardings = {"w": NamedSharding(cube, P("fsdp", "model"))}
    state = jax.eval_shape(optax.adam(1e-3).init, parameters)
    placed = partitioning.like_parameters(state, parameters, shardings, cube)
    specs = {str(sharding.spec) for sharding in jax.tree.leaves(placed)}
    assert specs == {str(P("fsdp", "model")), str(P())}
    assert placed[0].count.spec == P()
    assert placed[0].mu["w"].spec == placed[0].nu["w"].spec == P("fsdp", "model")


def test_a_batch_is_spread_over_data_and_fsdp(cube):
    array = jax.device_put(np.arange(8.0), partitioning.batch_sharding(cube))
    assert {tuple(shard.data.tolist()) for shard in array.addressable_shards} == {
        (0.0, 1.0),
        (2.0, 3.0),
        (4.0, 5.0),
        (6.0, 7.0),
    }


def test_rules_may_be_lists():
    rules = partitioning.Partitioning(rules=[["batch", ["data", "fsdp"]], ["vocab", "model"]])
    assert rules.rules == (("batch", ("data", "fsdp")), ("vocab", "model"))
    assert hash(rules) == hash(partitioning.Partitioning(rules=rules.rules))
