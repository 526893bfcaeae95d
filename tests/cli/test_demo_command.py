"""`dro_jax demo` as a whole, on a tenth of its prompts, with a smaller model and trainings of a few steps."""

import json

import pytest

from dro_jax.cli import demo
from dro_jax.data import demonstration

NUMBERS = {
    "win_rate",
    "optimum_win_rate",
    "improvement_fraction",
    "kl_to_optimum",
    "value_error",
    "constant_value_error",
    "reference_mass",
    "policy_mass",
    "seconds",
}


@pytest.fixture
def short_demo(command, monkeypatch):
    """The command, with two steps of SFT and of the algorithm, one layer a stack, and every tenth prompt."""
    original, some = demo.train_from, demonstration.prompts()[::10]
    shorter = {
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 8,
        "t5.T5Config.num_encoder_layers": 1,
        "t5.T5Config.num_decoder_layers": 1,
    }
    monkeypatch.setattr(
        demo, "train_from", lambda files, **macros: original(files, **shorter, **macros)
    )
    monkeypatch.setattr(demonstration, "prompts", lambda: some)
    return command


def test_the_demo_writes_what_it_promises_and_goes_on(short_demo, monkeypatch, tmp_path):
    workdir = tmp_path / "demo"
    first = short_demo("demo", "--workdir", str(workdir))
    assert first.code == 0, first
    summary = json.loads((workdir / "summary.json").read_text())
    assert {name for name, value in summary.items() if isinstance(value, float)} >= NUMBERS
    low, high = summary["win_rate_interval"]
    assert low <= summary["win_rate"] <= high
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == summary["held_out_prompts"]
    for place in ("sft/checkpoint_2", "dro_v/checkpoint_2", "dro_v/reference", "feedback.jsonl"):
        assert (workdir / place).exists()
    assert "win rate of the exact optimum" in first.out

    # As "all" does, with three of them.
    monkeypatch.setattr(demo, "ALGORITHMS", ("dro_v", "dro_v_single_net_single_value", "kto"))
    again = short_demo("demo", "--workdir", str(workdir), "--algorithm", "all")
    assert again.code == 0, again
    assert again.out.count("already at step 2 of 2") == 4
    summaries = {
        name: json.loads((workdir / name / "summary.json").read_text()) for name in demo.ALGORITHMS
    }
    assert {name: summary["algorithm"] for name, summary in summaries.items()} == {
        name: name for name in demo.ALGORITHMS
    }
    assert summaries["kto"] == json.loads((workdir / "summary.json").read_text())
    assert "this method has no V" in again.out
    lines = (workdir / "algorithms.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in summaries]
    for line, summary in zip(lines[2:], summaries.values(), strict=True):
        error = summary["value_error"]
        assert (error is None) == (summary["algorithm"] == "kto")
        assert line.split(" | ")[6] == ("-" if error is None else f"{error:.3f}")


def test_an_unknown_algorithm_is_refused(command, tmp_path):
    result = command("demo", "--workdir", str(tmp_path / "demo"), "--algorithm", "ppo")
    assert result.code == 2
    assert result.err.startswith("dro_jax: --algorithm ppo: choose one of dro_v, ")
    assert not (tmp_path / "demo").exists()
