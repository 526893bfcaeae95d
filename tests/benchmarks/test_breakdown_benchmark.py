"""The breakdown times every part and counts its operations, from arrays alone."""

import numpy as np
import pytest
import running

from dro_jax.data.packing import fill_rows
from dro_jax.training import cost

NETWORKS = ["encoder", "decoder", "vocabulary", "value", "reference"]
PARTS = [*NETWORKS, "optimizer", "data"]


def test_every_part_has_a_time_and_a_share_of_the_ceiling(tmp_path):
    found = running.run(
        "breakdown",
        *running.TRIAL,
        "--repeats=1",
        "--product=32",
        output=tmp_path / "results.json",
        arrays_alone=True,
    )
    lines = found["results"]
    expected = ["examples", "real tokens", "ceiling: a large product"]
    for part in PARTS:
        expected += [part, f"{part}: of the ceiling"] if part in NETWORKS else [part]
    for name in ("step", "step, cached reference"):
        used = f"{name}: model FLOPs utilisation"
        expected += [name, f"{name}: more than its parts"]
        expected += [f"{used}, all positions", f"{used}, real tokens"]
    assert list(lines) == expected
    assert all(line["least"] > 0 for name, line in lines.items() if "more than" not in name)
    # One repeat: the lines fit together.
    at = {name: line["median"] for name, line in lines.items()}
    apart = at["step"] - sum(at[part] for part in PARTS)
    assert at["step: more than its parts"] == pytest.approx(apart)
    used = "step: model FLOPs utilisation"
    assert at[f"{used}, real tokens"] < at[f"{used}, all positions"]
    shares = sum(at[part] * at[f"{part}: of the ceiling"] for part in NETWORKS)
    assert at["step"] * at[f"{used}, all positions"] == pytest.approx(shares)


def test_operations_of_real_tokens_are_those_of_each_example_alone(monkeypatch):
    # A file's rows may all be longer than the cut, and nothing be padding.
    monkeypatch.delenv("DRO_JAX_FEEDBACK_FILE", raising=False)
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import breakdown
    import workloads

    config, cut = workloads.SHAPES["trial"], {"inputs": 12, "targets": 10}
    examples = workloads.make_examples(40, {"inputs": 6, "targets": 5}, config.vocab_size, 0)
    rows = workloads.packed_rows(examples, cut)[:4]
    batch = fill_rows(rows, lengths=cut, max_examples=workloads.MAX_EXAMPLES)
    lengths = [
        np.bincount(batch[f"{side}_segment_ids"].ravel() + 17 * np.repeat(range(4), width))
        for side, width in (("encoder", 12), ("decoder", 10))
    ]
    alone = [
        cost.flops(cost.Workload(config, breakdown.ours.ALGORITHM.needs, 1, int(i), int(t)), 0)
        for n, (i, t) in enumerate(zip(*lengths, strict=False))
        if n % 17 and i
    ]
    assert len(alone) == workloads.count(batch)[0] > 4
    found = breakdown.operations_of_real_tokens(config, batch)
    for part in NETWORKS:
        assert found[part] == pytest.approx(sum(getattr(one, part) for one in alone))
        assert 0 < found[part] < breakdown.operations(config, batch)[part]
