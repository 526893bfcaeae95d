"""`dro_jax demo` as a whole, with its trainings cut to a few steps."""

import json

import pytest

from dro_jax.cli import demo

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
    """The command, with two steps of SFT and of the algorithm."""
    original = demo.train_from
    monkeypatch.setattr(
        demo, "train_from", lambda files, **macros: original(files, TRAIN_STEPS=2, **macros)
    )
    return command


def test_the_demo_writes_what_it_promises_and_goes_on(short_demo, tmp_path):
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

    again = short_demo("demo", "--workdir", str(workdir), "--algorithm", "dro_p")
    assert again.code == 0, again
    assert "already at step 2 of 2" in again.out
    assert "no value network" in again.out
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["algorithm"] == "dro_p"
    assert summary["value_error"] is None
