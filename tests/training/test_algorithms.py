"""From a method's name to its loss: every number it is given, against the networks run by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dro_jax import objectives
from dro_jax.errors import UsageError
from dro_jax.networks import T5, ValueNetwork
from dro_jax.training import step
from dro_jax.training.algorithms import DroP, DroV, Kto, Pairwise, Sft, TwoSampleDro
from dro_jax.training.optimizers import Adafactor

TAU = 0.7
METHODS = {
    "dro_v": DroV(tau=TAU),
    "dro_v mean": DroV(tau=TAU, log_probs="mean"),
    "single value": DroV(tau=TAU, values="single"),
    "per token": DroV(tau=TAU, values="per_token"),
    "single net": DroV(tau=TAU, networks="single"),
    "single net, single value": DroV(tau=TAU, networks="single", values="single"),
    "single net, per token": DroV(tau=TAU, networks="single", values="per_token"),
    "dro_p": DroP(tau=TAU),
    "two samples": TwoSampleDro(tau=TAU),
    "kto": Kto(tau=TAU, lambda_desirable=1.5),
    "kto mean": Kto(tau=TAU, log_probs="mean"),
    "kto labels": Kto(tau=TAU, desirable="above_dataset_mean", lambda_undesirable=0.5),
    "dpo": Pairwise(tau=TAU, kind="dpo"),
    "ipo": Pairwise(tau=TAU, kind="ipo"),
    "slic": Pairwise(tau=TAU, kind="slic"),
    "sft": Sft(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def batch(make_batch):
    """With other responses for KTO, a row of padding, and no target that is the last entry."""
    ours, theirs = make_batch(0), make_batch(1)
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        for tokens in (ours[name], theirs[name]):
            np.minimum(tokens, 30, out=tokens)
    ours["reward_weights"][5] = 0
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    return ours | {f"mismatched_{name}": theirs[name] for name in names}


@pytest.fixture(scope="module")
def networks(bench):
    """Parameters of policy, value network and reference, all different."""
    one, rng = bench(), np.random.default_rng(0)

    def perturbed(tree):
        return jax.tree.map(
            lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), tree
        )

    start = one.first_state
    return {"policy": perturbed(start.policy), "value": perturbed(start.value)}, start.policy


def config_of(bench, method):
    return dataclasses.replace(bench().config, reserved_entry=method.needs.value == "policy")


@pytest.fixture(scope="module")
def by_hand(bench, batch, networks, quick_jit):
    """What the networks say, one forward pass at a time, in float64 from the logits on."""
    config = bench().config
    params, _ = networks
    forward = quick_jit(lambda p, x, y: T5(config).apply({"params": p}, x, y))
    prompts = batch["encoder_input_tokens"]

    def log_prob(policy, prefix, entries):
        inputs, targets, weights = (
            batch[f"{prefix}decoder_{name}"]
            for name in ("input_tokens", "target_tokens", "loss_weights")
        )
        logits = np.float64(forward(policy, prompts, inputs))[..., :entries]
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (chosen * weights).sum(axis=1), weights.sum(axis=1)

    value = ValueNetwork(config)
    apply = quick_jit(value.apply, static_argnames="method")
    variables = {"params": params["value"]}
    inputs = batch["decoder_input_tokens"]
    last_logits = forward(params["policy"], prompts, inputs)[..., -1]
    return {
        "log_prob": log_prob,
        "one a prompt": {"network": apply(variables, prompts)[:, 0], "policy": last_logits[:, 0]},
        "per token": {
            "network": apply(variables, prompts, inputs, method="per_token"),
            "policy": last_logits,
        },
    }


@methods
def test_every_number_is_the_networks(method, bench, batch, networks, by_hand, quick_jit):
    needs, config = method.needs, config_of(bench, method)
    params, reference = networks
    run = quick_jit(lambda p, r, b: step.example_arrays(config, method, p, r, b))
    examples = run(params, reference, batch)
    entries = config.vocab_size - config.reserved_entry
    expected = {"weights": batch["reward_weights"][:, 0], "reward": batch["rewards"][:, 0]}
    for name, policy, prefix in (
        ("policy_log_prob", params["policy"], ""),
        ("reference_log_prob", reference, ""),
        ("mismatched_policy_log_prob", params["policy"], "mismatched_"),
        ("mismatched_reference_log_prob", reference, "mismatched_"),
    ):
        log_prob, tokens = by_hand["log_prob"](policy, prefix, entries)
        expected[name] = log_prob / tokens if needs.token_mean else log_prob
    if not needs.reference:
        expected["reference_log_prob"] = None
    if not needs.mismatched:
        expected |= dict.fromkeys(name for name in expected if name.startswith("mismatched"))
    expected |= {"value": None, "value_variance": None}
    if needs.per_token_values:
        values, real = by_hand["per token"][needs.value], batch["decoder_loss_weights"] > 0
        rows = [np.float64(row[keep]) for row, keep in zip(values, real, strict=True)]
        expected["value"] = np.array([row.mean() for row in rows])
        expected["value_variance"] = np.array([row.var() for row in rows])
    elif needs.value is not None:
        expected["value"] = by_hand["one a prompt"][needs.value]
    expected["target_tokens"] = batch["decoder_loss_weights"].sum(axis=1)
    got = vars(examples)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        if array is None:
            assert got[name] is None, name
        else:
            np.testing.assert_allclose(got[name][:, 0], array, atol=2e-5, err_msg=name)


@methods
def test_h_and_v_are_exactly_0_at_step_0(method, bench, batch, quick_jit):
    config = config_of(bench, method)
    one = bench(algorithm=method, config=config)
    state = one.first_state
    params = {"policy": state.policy, "value": state.value}
    run = quick_jit(lambda p, r, b: step.example_arrays(config, method, p, r, b))
    examples = run(params, one.reference, batch)
    if method.needs.reference:
        assert np.all(examples.policy_log_prob == examples.reference_log_prob)
    if method.needs.mismatched:
        assert np.all(examples.mismatched_policy_log_prob == examples.mismatched_reference_log_prob)
    if method.needs.value is not None:
        assert np.all(examples.value == 0)
    assert bool(state.value) == (method.needs.value == "network")


def test_a_single_nets_policy_is_the_reference_but_for_one_column(bench):
    one = bench(algorithm=METHODS["single net"], config=config_of(bench, METHODS["single net"]))
    policy, reference = (
        flatten_dict(tree, sep="/") for tree in (one.first_state.policy, one.reference)
    )
    kernel = "decoder/logits_dense/kernel"
    for name, leaf in reference.items():
        if name != kernel:
            np.testing.assert_array_equal(policy[name], leaf, err_msg=name)
    np.testing.assert_array_equal(policy[kernel][:, :-1], reference[kernel][:, :-1])
    assert np.all(policy[kernel][:, -1] == 0)
    assert np.any(np.asarray(reference[kernel])[:, -1] != 0)


def numbers(examples, names="policy_log_prob reference_log_prob reward weights"):
    return {name: getattr(examples, name) for name in names.split()}


def expected_loss(name, examples):
    """The objective, called with what the method's definition says."""
    arrays = numbers(examples)
    if name == "sft":
        names = "policy_log_prob target_tokens weights"
        return objectives.sft_loss(**numbers(examples, names))[0]
    pairs = {key: array.reshape(8, 2) for key, array in arrays.items()}
    mismatched = numbers(examples, "mismatched_policy_log_prob mismatched_reference_log_prob")
    if name.startswith("kto"):
        labels = {"desirable": examples.reward > 0, "lambda_undesirable": 0.5}
        extra = {"kto": {"lambda_desirable": 1.5}, "kto labels": labels}.get(name, {})
        return objectives.kto_loss(**arrays, **mismatched, tau=TAU, **extra)[0]
    if name in ("dpo", "ipo", "slic"):
        return objectives.pairwise_loss(**pairs, tau=TAU, kind=name)[0]
    if name == "two samples":
        return objectives.two_sample_dro_loss(**pairs, tau=TAU)[0]
    if name == "dro_p":
        return objectives.dro_p_loss(**arrays, tau=TAU)[0]
    extra = {"value_variance": examples.value_variance} if "per token" in name else {}
    if "single value" in name:
        extra = {"mean_value": jnp.sum(examples.value * examples.weights) / 15}
    return objectives.dro_v_loss(**arrays, value=examples.value, tau=TAU, **extra)[0]


@pytest.mark.parametrize("name", METHODS)
def test_its_loss_and_gradients_are_its_objectives(name, bench, batch, networks, quick_jit):
    method, config = METHODS[name], config_of(bench, METHODS[name])
    params, reference = networks

    def losses(params):
        examples = step.example_arrays(config, method, params, reference, batch)
        return jnp.stack([method.loss(examples)[0], expected_loss(name, examples)])

    both, gradients = quick_jit(lambda p: (losses(p), jax.jacrev(losses)(p)))(params)
    assert both[0] == pytest.approx(float(both[1]), rel=1e-6)
    assert abs(float(both[0])) > 1e-3
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-4, atol=1e-6)
    trained = {"policy"} | ({"value"} if method.needs.value == "network" else set())
    moved = {
        part
        for part, tree in gradients.items()
        if any(np.any(x != 0) for x in jax.tree.leaves(tree))
    }
    assert moved == trained


def test_ktos_estimate_of_the_kl_passes_no_gradient(bench, batch, networks, quick_jit):
    method, config = METHODS["kto"], bench().config
    params, reference = networks

    def estimate(policy, prefix):
        examples = step.example_arrays(config, method, {"policy": policy}, reference, batch)
        return getattr(examples, f"{prefix}policy_log_prob").sum()

    gradient = quick_jit(jax.grad(estimate), static_argnums=1)
    largest = {
        prefix: max(
            float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient(params["policy"], prefix))
        )
        for prefix in ("", "mismatched_")
    }
    assert largest[""] > 0.1
    assert largest["mismatched_"] == 0


def test_mismatched_log_probs_of_the_reference_may_be_cached(bench, batch, networks, quick_jit):
    method, config = METHODS["kto mean"], bench().config
    params, reference = networks
    run = quick_jit(lambda p, r, b: step.example_arrays(config, method, p, r, b))
    in_memory = run(params, reference, batch)
    tokens = batch["decoder_loss_weights"].sum(axis=1, keepdims=True)
    other_tokens = batch["mismatched_decoder_loss_weights"].sum(axis=1, keepdims=True)
    cached = batch | {
        "reference_log_probs": in_memory.reference_log_prob * tokens,
        "mismatched_reference_log_probs": in_memory.mismatched_reference_log_prob * other_tokens,
    }
    without = run(params, None, cached)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), vars(without), vars(in_memory)
    )


@pytest.mark.parametrize(
    "name", ["single net", "per token", "single net, per token", "dro_v", "dro_v mean"]
)
def test_packed_rows_give_the_numbers_of_unpacked_ones(name, bench, batch, networks, quick_jit):
    # Rows 2i and 2i + 1 in one row, each with its padding cut away.
    method, config = METHODS[name], config_of(bench, METHODS[name])
    params, reference = networks
    run = quick_jit(lambda p, r, b: step.example_arrays(config, method, p, r, b))
    rows = range(0, 16, 2)

    def pack(source, real, width):
        packed = np.zeros((8, width), np.int32)
        segments = np.zeros((8, width), np.int32)
        for i in rows:
            parts = [batch[source][j][batch[real][j] > 0] for j in (i, i + 1)]
            joined = np.concatenate(parts)
            packed[i // 2, : len(joined)] = joined
            segments[i // 2, : len(joined)] = np.repeat([1, 2], [len(part) for part in parts])
        return packed, segments

    packed = {}
    packed["encoder_input_tokens"], packed["encoder_segment_ids"] = pack(
        "encoder_input_tokens", "encoder_input_tokens", 14
    )
    for source in ("decoder_input_tokens", "decoder_target_tokens"):
        packed[source], packed["decoder_segment_ids"] = pack(source, "decoder_loss_weights", 10)
    packed["decoder_loss_weights"] = (packed["decoder_segment_ids"] > 0).astype(np.int32)
    # Three slots: the last holds no example.
    for source in ("rewards", "reward_weights"):
        packed[source] = np.pad(batch[source].reshape(8, 2), ((0, 0), (0, 1)))
    together, alone = run(params, reference, packed), run(params, reference, batch)
    for field in ("policy_log_prob", "reference_log_prob", "value", "value_variance"):
        if getattr(alone, field) is not None:
            got = np.asarray(getattr(together, field))
            expected = np.asarray(getattr(alone, field)).reshape(8, 2)
            np.testing.assert_allclose(got[:, :2], expected, atol=1e-5, err_msg=field)
            assert np.all(np.isfinite(got))


def test_a_single_net_learns_values_and_policy_with_one_optimiser(bench, make_batch):
    method = DroV(tau=0.5, networks="single")
    optimizer = Adafactor(policy_learning_rate=3e-3, warmup_steps=10)
    # One entry more than the batches have tokens.
    config = dataclasses.replace(config_of(bench, method), vocab_size=33)
    one = bench(algorithm=method, config=config, optimizer=optimizer)
    state, metrics = one.state(), []
    train_step = one.quick_step(one.reference, make_batch(0))
    for number in range(150):
        state, latest = train_step(state, one.reference, one.to_devices(make_batch(number)))
        metrics.append({name: float(value) for name, value in latest.items()})
    assert set(state.opt_state) == {"policy"}
    assert metrics[0]["value/mean"] == 0
    assert np.mean([m["value/explained_variance"] for m in metrics[-20:]]) > 0.2
    assert np.mean([m["loss/dro"] for m in metrics[-20:]]) < 0.8 * metrics[0]["loss/dro"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DroV(tau=0), r"TAU \(DroV.tau\) is 0"),
        (lambda: Kto(tau=-1), r"TAU \(Kto.tau\) is -1"),
        (lambda: DroP(log_probs="max"), "DroP.log_probs is 'max'"),
        (lambda: DroV(values="two"), "DroV.values is 'two'"),
        (lambda: DroV(networks="triple"), "DroV.networks is 'triple'"),
        (lambda: Kto(desirable="good"), "Kto.desirable is 'good'"),
        (lambda: Kto(lambda_desirable="much"), "Kto.lambda_desirable is 'much'"),
        (lambda: Pairwise(kind="ppo"), "Pairwise.kind is 'ppo'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_methods_with_another_training_state_have_another_name():
    states = {
        name: (method.name, method.needs.value == "network") for name, method in METHODS.items()
    }
    assert states["dro_v"] == states["single value"] == states["per token"] == ("dro_v", True)
    assert states["single net"] == ("dro_v_single_net", False)
    assert len(set(states.values())) == len({name for name, _ in states.values()})
