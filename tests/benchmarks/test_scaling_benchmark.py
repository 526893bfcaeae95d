"""The scaling benchmark measures each size in a process of its own, from arrays alone."""

import running


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
    costs = ["a step", "to compile", "temporaries, says the compiler", "peak memory"]
    assert list(lines) == [f"as it is: {what}" for what in costs]
    assert all(line["least"] > 0 for line in lines.values())
    assert lines["as it is: a step"]["repeats"] == 2


def test_sizes_are_halved_and_doubled_one_at_a_time(monkeypatch):
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import scaling
    import workloads

    config, lengths = workloads.SHAPES["small"], {"inputs": 256, "targets": 512}
    found = scaling.sizes(config, 8, lengths, ("batch", "lengths", "depth"))
    described = {
        name: (model.num_encoder_layers, model.num_decoder_layers, rows, *cut.values())
        for name, (model, rows, cut) in found.items()
    }
    assert described == {
        "as it is": (8, 8, 8, 256, 512),
        "half the batch": (8, 8, 4, 256, 512),
        "half the lengths": (8, 8, 8, 128, 256),
        "half the depth": (4, 4, 8, 256, 512),
        "twice the batch": (8, 8, 16, 256, 512),
        "twice the lengths": (8, 8, 8, 512, 1024),
        "twice the depth": (16, 16, 8, 256, 512),
    }
