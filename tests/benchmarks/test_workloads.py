"""What the training benchmarks train on: shipped shapes, real lengths."""

import json

import gin
import numpy as np
import pytest
import running

from dro_jax.cli import configuration
from dro_jax.networks import T5Config

CUT = {"inputs": 64, "targets": 96}


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.delenv("DRO_JAX_FEEDBACK_FILE", raising=False)
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import workloads

    return workloads


def test_shapes_are_those_of_the_gin_files(workloads):
    sizes = [name for name in workloads.SHAPES if name != "trial"]
    assert sizes == ["small", "base", "large", "xl"]
    for size in sizes:
        gin.clear_config()
        gin.parse_config_file(configuration.shipped_configs() / f"models/t5_1_1_{size}.gin")
        bound = {
            name: value
            for (_, selector), fields in gin.config._CONFIG.items()
            if selector.endswith("T5Config")
            for name, value in fields.items()
        }
        assert T5Config(**bound) == workloads.SHAPES[size]
    gin.clear_config()


def test_lengths_are_the_histogram_s(workloads):
    examples = workloads.make_examples(4000, {"inputs": 10**6, "targets": 10**6}, 64, seed=0)
    table = json.loads((running.BENCHMARKS / "lengths.json").read_text())
    prompts, completions, rows = np.array(table["counts"]).T
    for name, buckets in (("inputs", prompts), ("targets", completions)):
        # In tokens of four bytes, an end of sequence behind them.
        mean = np.average(buckets * table["bucket"] + table["bucket"] / 2, weights=rows) / 4 + 1
        assert np.mean([len(e[name]) for e in examples]) == pytest.approx(mean, rel=0.05)


def test_lengths_may_be_a_file_s(workloads, monkeypatch, tmp_path):
    row = {"prompt": "é" * 20, "completion": "x" * 12, "reward": 1.0}
    file = tmp_path / "feedback.jsonl"
    file.write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("DRO_JAX_FEEDBACK_FILE", str(file))
    for example in workloads.make_examples(3, CUT, 64, seed=0):
        assert (len(example["inputs"]), len(example["targets"])) == (11, 4)


def test_every_example_is_in_one_row_of_each_kind_of_batch(workloads):
    examples = workloads.make_examples(64, CUT, 384, seed=0)
    kinds = {
        "longest": list(workloads.padded(examples, 8, CUT, multiple=32)),
        "maximum": list(workloads.padded_to(examples, 8, CUT)),
        "packed": list(workloads.packed(examples, CUT, batch=8, multiple=1)),
    }
    rewards = sorted(float(example["rewards"][0]) for example in examples)
    tokens = sum(len(e["inputs"]) + len(e["targets"]) for e in examples)
    positions = {}
    for kind, batches in kinds.items():
        found = [r for b in batches for r in b["rewards"][b["reward_weights"] > 0]]
        assert sorted(map(float, found)) == rewards
        totals = np.sum([workloads.count(batch) for batch in batches], axis=0)
        assert tuple(totals[:2]) == (64, tokens)
        positions[kind] = totals[2]
    assert positions["maximum"] == 64 * (64 + 96)
    assert positions["packed"] < positions["longest"] <= positions["maximum"]
    for batch in kinds["longest"]:
        assert batch["encoder_input_tokens"].shape[1] % 32 == 0


def test_a_packed_batch_holds_the_examples_of_the_padded_one(workloads):
    examples = workloads.make_examples(96, CUT, 384, seed=0)
    padded = list(workloads.padded_to(examples, 32, CUT))
    packed = list(workloads.packed(examples, CUT, batch=32, multiple=1))
    assert len(packed) == len(padded) == 3
    for rows, alone in zip(packed, padded, strict=True):
        found = rows["rewards"][rows["reward_weights"] > 0]
        assert sorted(found) == sorted(alone["rewards"][:, 0])
        assert len(rows["rewards"]) < 32
