"""The scaling benchmark measures each size in a process of its own, from arrays alone."""

import pytest
import running

TEMPORARIES = (
    "gradients",
    "weights in the compute type",
    "weights gathered",
    "kept for the backward pass",
    "logits and their gradient",
    "within a layer",
    "relative biases and gradients",
)


def test_a_size_has_its_costs(tmp_path):
    found = running.run(
        "scaling",
        *running.TRIAL,
        "--repeats=2",
        "--grow",
        output=tmp_path / "results.json",
        arrays_alone=True,
    )
    lines = found["results"]
    costs = ["a step", "to compile"]
    costs += [f"state, {part}" for part in ("policy", "value", "optimizer", "reference")]
    costs += ["state", "state / plan's"]
    costs += [f"temporaries by plan, {part}" for part in TEMPORARIES]
    costs += ["temporaries, says the compiler", "temporaries / plan's", "peak memory"]
    assert list(lines) == [f"as it is: {what}" for what in costs]
    assert all(line["least"] > 0 for name, line in lines.items() if "by plan" not in name)
    assert lines["as it is: a step"]["repeats"] == 2
    # What the arrays take is what plan reckons with.
    assert lines["as it is: state / plan's"]["median"] == pytest.approx(1, abs=0.02)
    at = {name.removeprefix("as it is: "): line["median"] for name, line in lines.items()}
    assert at["state, policy"] == at["state, reference"] > at["state, value"] > 0


def test_sizes_are_halved_and_doubled_one_at_a_time(monkeypatch):
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import scaling
    import workloads

    as_it_is = scaling.Size(workloads.SHAPES["small"], 8, {"inputs": 256, "targets": 512})
    found = scaling.sizes(as_it_is, ("batch", "lengths", "depth", "devices"), devices=4)
    described = {
        name: (
            size.config.num_encoder_layers,
            size.config.num_decoder_layers,
            size.rows,
            *size.lengths.values(),
            size.devices,
        )
        for name, size in found.items()
    }
    assert described == {
        "as it is": (8, 8, 8, 256, 512, 1),
        "half the batch": (8, 8, 4, 256, 512, 1),
        "half the lengths": (8, 8, 8, 128, 256, 1),
        "half the depth": (4, 4, 8, 256, 512, 1),
        "twice the batch": (8, 8, 16, 256, 512, 1),
        "twice the lengths": (8, 8, 8, 512, 1024, 1),
        "twice the depth": (16, 16, 8, 256, 512, 1),
        "2 devices": (8, 8, 16, 256, 512, 2),
        "4 devices": (8, 8, 32, 256, 512, 4),
    }
