"""One training, many ways to lay it out: every mesh, processes, microbatches, scanned and rematerialised layers."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from equivalence import METHODS, OPTIMIZERS, history, packed_batch

DEEP = {"num_encoder_layers": 2, "num_decoder_layers": 2}


@pytest.fixture(scope="module")
def trained(bench, make_batch):
    """The history of a method on a mesh, and its last state."""

    def train(method, sizes=(1, 1, 1), packed=True, microbatches=1, optimizer="descent", **config):
        config = dataclasses.replace(bench().config, **config)
        one = bench(sizes, METHODS[method], OPTIMIZERS[optimizer], config)
        return history(one, packed_batch if packed else make_batch, microbatches)

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
    got, want = got[0], want[0]
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
def test_eight_devices_train_as_one_does(sizes, trained, plain, bench):
    history, state = trained("dro_v", sizes, optimizer="adafactor")
    of_one, state_of_one = plain("dro_v", optimizer="adafactor")
    assert_same((history, state), (of_one, state_of_one))
    # It ends where it began to lie, with the same weights.
    layout = bench(sizes, METHODS["dro_v"], OPTIMIZERS["adafactor"]).layout
    placed = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout.shardings
    )
    assert all(jax.tree.leaves(placed))
    for part in ("policy", "value"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            *(jax.device_get(getattr(s, part)) for s in (state, state_of_one)),
        )


# (2, 2, 2) is trained by two processes below; with (1, 1, 8) no rows are cut, of which these methods have statistics.
@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
@pytest.mark.parametrize("method", ["dro_p", "kto"])
def test_statistics_over_the_rows_of_eight_devices_are_those_of_one(method, sizes, trained, plain):
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
    [(False, "dots"), (True, "none"), (True, "full")],
)
def test_scanned_and_rematerialised_layers_train_as_unrolled_ones(
    scan_layers, remat, trained, plain
):
    got = trained("dro_v", scan_layers=scan_layers, remat=remat, **DEEP)
    assert_same(got, plain("dro_v", **DEEP))


def test_scanned_layers_on_eight_devices_train_as_unrolled_ones_on_one(trained, plain):
    got = trained("dro_v", (2, 2, 2), scan_layers=True, remat="dots", microbatches=2, **DEEP)
    assert_same(got, plain("dro_v", **DEEP))


@pytest.mark.parametrize(("method", "sizes"), [("dro_v", (2, 2, 2)), ("kto", (1, 8, 1))])
def test_logits_in_chunks_on_eight_devices_train_as_whole_ones_on_one(
    method, sizes, trained, plain
):
    assert_same(trained(method, sizes, logits_chunk=3), plain(method))


def test_two_processes_of_four_devices_train_as_one(plain, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("one_of_two_processes.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(number), str(tmp_path / f"{number}.json")],
            env=environment,
        )
        for number in range(2)
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert found[0] == found[1]
    assert set(found[0]) == {"dro_v", "dro_p", "kto"}
    for method, got in found[0].items():
        assert_same((got, None), plain(method))
