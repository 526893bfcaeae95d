"""What a step costs by arithmetic, against XLA's own count of unrolled steps and against bytes counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from dro_jax.data.packing import fill_rows
from dro_jax.networks import T5Config
from dro_jax.training import cost, partitioning, step, train_state
from dro_jax.training.algorithms import DroP, DroV, Kto, Sft
from dro_jax.training.optimizers import Adafactor

# Wide enough that products are nearly all there is to count.
CONFIG = T5Config(
    vocab_size=384,
    emb_dim=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=512,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dtype="float32",
)
DRO_V = DroV()


def workload(algorithm, *, config=CONFIG, **changes):
    first = jax.eval_shape(algorithm.loss_weights, *[jax.ShapeDtypeStruct((1, 1), jnp.float32)] * 2)
    return cost.Workload(
        config=dataclasses.replace(config, reserved_entry=algorithm.needs.value == "policy"),
        needs=algorithm.needs,
        forward_first=first is None,
        **({"rows": 4, "inputs": 128, "targets": 96} | changes),
    )


def counted_by_xla(algorithm, work):
    """Operations of loss and gradients, of the program as it is traced."""
    one = np.ones(1, np.int32)
    example = {"inputs": one, "targets": one, "rewards": one}
    if work.needs.mismatched:
        example["mismatched_targets"] = one
    if work.cached:
        example["reference_log_probs"] = one
    batch = fill_rows(
        [[example]] * work.rows,
        lengths={"inputs": work.inputs, "targets": work.targets},
        max_examples=work.slots,
    )

    def shapes(init):
        return meta.unbox(jax.eval_shape(lambda: init(work.config, 0)))

    params = {"policy": shapes(train_state.init_policy)}
    if work.needs.value == "network":
        params["value"] = shapes(train_state.init_value)
    reference = params["policy"] if work.reference else None

    def gradients(params, reference, batch):
        return step.loss_and_gradients(
            work.config, algorithm, params, reference, batch, work.microbatches
        )

    lowered = jax.jit(gradients).lower(params, reference, jax.tree.map(jnp.asarray, batch))
    return lowered.cost_analysis()["flops"]


def with_config(**changes):
    return {"config": dataclasses.replace(CONFIG, **changes)}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (Sft(), {}),
        (DRO_V, {}),
        (DRO_V, {"cached": True, "slots": 4}),
        (DroV(networks="single"), {}),
        (DroV(values="per_token"), {}),
        (Kto(tau=5.0), {}),
        (DRO_V, with_config(remat="dots")),
        (DRO_V, with_config(remat="full")),
        # XLA counts one turn of a loop: one chunk of all positions.
        (DRO_V, with_config(logits_chunk=4 * 96)),
        (Sft(), with_config(mlp_activations=("relu",), logits_via_embedding=True)),
    ],
    ids=str,
)
def test_operations_are_those_that_xla_counts(algorithm, changes):
    work = workload(algorithm, **changes)
    flops = cost.flops(work, parameters=0)
    # XLA counts more than products; by this much.
    assert 1 < counted_by_xla(algorithm, work) / flops.total < 1.01


@pytest.mark.parametrize("algorithm", [DRO_V, DroP(), Kto(tau=5.0)], ids=str)
def test_microbatches_repeat_what_the_step_repeats(algorithm):
    work = workload(algorithm, microbatches=2)
    # XLA counts one turn of a loop, here one of two microbatches.
    ratio = 2 * counted_by_xla(algorithm, work) / cost.flops(work, parameters=0).total
    assert 1 < ratio < 1.01
    assert (cost.flops(work, parameters=0).recomputed > 0) == work.forward_first


def test_the_parts_are_what_they_say():
    whole = cost.flops(workload(DRO_V), parameters=10)
    assert whole.optimizer == 10 * cost.ADAFACTOR
    assert whole.mismatched == whole.recomputed == 0
    # The reference is one forward pass, the policy three of the same.
    assert 3 * whole.reference == whole.encoder + whole.decoder + whole.vocabulary
    cached = cost.flops(workload(DRO_V, cached=True), parameters=10)
    assert cached == dataclasses.replace(whole, reference=0)
    twice = cost.flops(workload(DRO_V, rows=8), parameters=20)
    assert dataclasses.astuple(twice) == tuple(2 * n for n in dataclasses.astuple(whole))


def test_adafactor_costs_what_xla_counts():
    transform = Adafactor().transforms()["policy"]
    params = meta.unbox(jax.eval_shape(lambda: train_state.init_policy(CONFIG, 0)))
    state = jax.eval_shape(transform.init, params)

    def update(grads, state, params):
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax.tree.norm(params), optax.tree.norm(grads)

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    flops = jax.jit(update).lower(params, state, params).cost_analysis()["flops"]
    assert flops / count == pytest.approx(cost.ADAFACTOR, rel=0.03)


def layout_of(config=CONFIG, *, data=1, fsdp=1, model=1):
    rules = partitioning.Partitioning(data=data, fsdp=fsdp, model=model)
    mesh = rules.mesh(jax.devices()[: data * fsdp * model])
    return train_state.make_layout(
        config, Adafactor().transforms(), has_value=True, mesh=mesh, rules=rules
    )


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_state_on_one_device_is_all_of_it():
    layout = layout_of()
    held = cost.state_bytes(layout, reference=True)
    assert held["policy"] == held["reference"] == 4 * sizes(layout.shapes.policy)
    assert held["value"] == 4 * sizes(layout.shapes.value)
    assert held["optimizer"] == 4 * sizes(layout.shapes.opt_state)
    assert cost.state_bytes(layout, reference=False)["reference"] == 0


def test_state_is_what_the_devices_of_a_mesh_hold():
    layout = layout_of(fsdp=4, model=2)
    held = cost.state_bytes(layout, reference=False)
    state = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), layout.shapes),
        out_shardings=layout.shardings,
    )()
    for name, tree in (
        ("policy", state.policy),
        ("value", state.value),
        ("optimizer", state.opt_state),
    ):
        first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.nbytes, tree)
        assert held[name] == sum(jax.tree.leaves(first))


def test_what_saves_memory_saves_memory():
    layout = layout_of(fsdp=4)

    def needed(work, layout=layout):
        return sum(cost.temporary_bytes(work, layout).values())

    whole = workload(DRO_V, rows=64)
    less = [
        workload(DRO_V, rows=64, cached=True),
        workload(DRO_V, rows=64, microbatches=4),
        workload(DRO_V, rows=32),
        workload(DRO_V, rows=64, **with_config(remat="dots")),
        workload(DRO_V, rows=64, **with_config(dtype="bfloat16")),
        workload(DRO_V, rows=64, **with_config(logits_chunk=8)),
    ]
    for work in less:
        assert needed(work) < needed(whole)
    assert needed(workload(DRO_V, rows=64, **with_config(remat="full"))) < needed(less[3])
    assert needed(whole, layout_of(fsdp=8)) < needed(whole)


def test_weights_are_gathered_and_gradients_scattered():
    """On four devices that each hold a quarter of every weight but the relative biases."""
    layout = layout_of(fsdp=4)
    work = workload(DRO_V, **with_config(remat="dots", dtype="bfloat16"))

    def cut(tree):
        sizes_ = [leaf.size for leaf in jax.tree.leaves(tree)]
        return 0.75 * 2 * sum(size for size in sizes_ if size not in (4 * 32, 1))

    policy, value = cut(layout.shapes.policy), cut(layout.shapes.value)
    sent = cost.sent_bytes(work, layout)
    # Forward and backward, and the reference forward.
    assert sent["all-gather"] == 3 * policy + 2 * value
    assert sent["reduce-scatter"] == policy + value
    assert sent["all-reduce"] < 1e-3 * sent["reduce-scatter"]
    halves = cost.sent_bytes(dataclasses.replace(work, microbatches=2), layout)
    assert halves["all-gather"] == 2 * sent["all-gather"]


def test_replicas_sum_their_gradients():
    work = workload(DRO_V, **with_config(dtype="bfloat16"))
    layout = layout_of(data=4)
    sent = cost.sent_bytes(work, layout)
    numbers = sizes(layout.shapes.policy) + sizes(layout.shapes.value)
    assert (sent["all-gather"], sent["reduce-scatter"]) == (0, 0)
    assert sent["all-reduce"] == pytest.approx(2 * 0.75 * 2 * numbers)


def test_one_device_sends_nothing():
    assert set(cost.sent_bytes(workload(DRO_V), layout_of()).values()) == {0}


def test_more_is_touched_where_more_is_kept():
    layout = layout_of(fsdp=4)
    state = sum(cost.state_bytes(layout, reference=True).values())
    dots, full = (
        cost.touched_bytes(workload(DRO_V, **with_config(remat=remat)), layout)
        for remat in ("dots", "full")
    )
    assert dots > full > 2 * state
