"""The conversion benchmark runs from its command line and compares every direction."""

import importlib.util

import pytest
import running

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
DIRECTIONS = ["import", "export", "export to T5X", "import from T5X"]


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_every_direction_has_its_seconds_and_memory(tmp_path):
    flags = ["--model=trial", "--repeats=2"]
    found = running.run("convert", *flags, output=tmp_path / "results.json")
    lines = found["results"]
    other = "transformers: open and save"
    of_steps = [f"{step}{what}" for step in [*DIRECTIONS, other] for what in ("", ": memory")]
    assert list(lines) == [*of_steps, *(f"{step} / {other}" for step in DIRECTIONS)]
    for step in [*DIRECTIONS, other]:
        assert lines[step]["least"] > 0
        assert lines[f"{step}: memory"]["least"] >= 0


def test_what_is_converted_is_the_model_itself(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import convert
    import workloads
    from safetensors.numpy import load_file

    size = convert.make(tmp_path / "model", workloads.SHAPES["trial"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    # transformers has no array of its own for the table of encoder and decoder.
    assert sum(array.nbytes for array in weights.values()) >= size > 0
    convert.converted(str(tmp_path / "model"), str(tmp_path / "run"), None)
    convert.converted(str(tmp_path / "run"), str(tmp_path / "back"), "huggingface")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert weights.keys() == back.keys()
    assert all((back[name] == weights[name]).all() for name in weights)
