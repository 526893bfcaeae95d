"""One training, many ways to lay it out: every mesh, microbatches, scanned and rematerialised layers."""

import dataclasses

import jax
import numpy as np
import pytest

from dro_jax.data.packing import fill_rows
from dro_jax.training import step
from dro_jax.training.algorithms import DroP, DroV, Kto, Pairwise, Sft

QUICK = {"xla_backend_optimization_level": 0}
STEPS = 20
DEEP = {"num_encoder_layers": 2, "num_decoder_layers": 2}
LENGTHS = {"inputs": 16, "targets": 12}
METHODS = {
    "dro_v": DroV(tau=0.5),
    "dro_v_single_value": DroV(tau=0.5, values="single"),
    "dro_p": DroP(tau=0.5),
    "kto": Kto(tau=0.5),
    "dpo": Pairwise(tau=0.5),
    "sft": Sft(),
}


def packed_batch(number, rows=16, slots=3):
    """Rows of one to three examples, a row without any, rewards that differ in spread from row to row."""
    rng = np.random.default_rng([7, number])

    def text(longest):
        return np.append(rng.integers(3, 32, rng.integers(0, longest)), 1).astype(np.int32)

    def example(row):
        return {
            "inputs": text(5),
            "targets": text(4),
            "mismatched_targets": text(4),
            "rewards": np.float32([row / 8 - 1 + rng.normal() * (row % 3)]),
        }

    packed = [[example(row) for _ in range(rng.integers(1, slots + 1))] for row in range(rows)]
    packed[number % rows] = []
    return fill_rows(packed, lengths=LENGTHS, max_examples=slots)


@pytest.fixture(scope="module")
def trained(bench, make_batch):
    """Loss and gradient norms of 20 steps from one start, away from the reference and from V = 0."""

    def train(method, sizes=(1, 1, 1), packed=True, microbatches=1, **config):
        one = bench(sizes, METHODS[method], config=dataclasses.replace(bench().config, **config))
        rng = np.random.default_rng(1)

        def moved(tree):
            return jax.tree.map(
                lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), tree
            )

        first = one.first_state
        state = one.state(policy=moved(first.policy), value=moved(first.value))
        make = packed_batch if packed else make_batch
        train_step = (
            step.make_train_step(
                one.config,
                one.algorithm,
                one.optimizer.transforms(),
                one.optimizer.schedules(),
                one.layout,
                microbatches,
            )
            .lower(state, one.reference, one.to_devices(make(0)))
            .compile(compiler_options=QUICK)
        )
        history = []
        for number in range(STEPS):
            state, metrics = train_step(state, one.reference, one.to_devices(make(number)))
            history.append({name: float(value) for name, value in metrics.items()})
        return history

    return train


@pytest.fixture(scope="module")
def plain(trained):
    """The same on one device, whole batches, layers unrolled: once a method."""
    found = {}

    def run(method, **others):
        key = method, *others.items()
        if key not in found:
            found[key] = trained(method, **others)
        return found[key]

    return run


def assert_same(got, want):
    """Within 1e-5 in the largest and in the mean difference of losses and gradient norms."""
    names = [name for name in want[0] if name.startswith(("loss", "grad_norm"))]
    assert len(names) >= 2
    for name in names:
        a, b = (np.array([metrics[name] for metrics in run]) for run in (got, want))
        assert np.ptp(b) > 1e-3 * abs(b[0]), name
        difference = (a - b) / np.maximum(1, np.abs(b))
        assert np.abs(difference).max() < 1e-5, (name, difference)
        assert abs(difference.mean()) < 1e-5, name


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("method", ["dro_v", "dro_p", "kto"])
def test_eight_devices_train_as_one_does(method, sizes, trained, plain):
    assert_same(trained(method, sizes), plain(method))


def test_unpacked_rows_on_eight_devices_train_as_on_one(trained, plain):
    assert_same(trained("dro_v", (2, 2, 2), packed=False), plain("dro_v", packed=False))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpo"])
def test_microbatches_train_as_the_whole_batch_does(method, trained, plain):
    assert_same(trained(method, microbatches=4), plain(method))


def test_microbatches_keep_pairs_together(trained, plain):
    assert_same(trained("dpo", packed=False, microbatches=4), plain("dpo", packed=False))


def test_microbatches_on_eight_devices_train_as_the_whole_batch_on_one(trained, plain):
    assert_same(trained("kto", (2, 2, 2), microbatches=2), plain("kto"))


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(False, "dots"), (False, "full"), (True, "none"), (True, "dots"), (True, "full")],
)
def test_scanned_and_rematerialised_layers_train_as_unrolled_ones(
    scan_layers, remat, trained, plain
):
    got = trained("dro_v", scan_layers=scan_layers, remat=remat, **DEEP)
    assert_same(got, plain("dro_v", **DEEP))


def test_scanned_layers_on_eight_devices_train_as_unrolled_ones_on_one(trained, plain):
    got = trained("dro_v", (2, 2, 2), scan_layers=True, remat="dots", microbatches=2, **DEEP)
    assert_same(got, plain("dro_v", **DEEP))
