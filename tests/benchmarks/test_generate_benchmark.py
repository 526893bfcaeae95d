"""The decoding benchmark runs from its command line, and both sides make the same tokens."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_every_line_has_a_number(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, REPOSITORY / "benchmarks" / "generate.py", "--output", output]
    # One device, as a user has it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    settings = [
        "--size=trial",
        "--batch_size=3",
        "--prompt_tokens=8",
        "--new_tokens=5",
        "--repeats=2",
    ]
    done = subprocess.run(
        [*command, *settings], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "decoding, T5 trial, batch 3, 8 prompt tokens, 5 new ones" in done.stdout
    found = json.loads(output.read_text())
    assert int(found["conditions"]["cores"]) >= 1
    lines = {line["name"]: line for line in found["results"]}
    names = []
    for way in ("greedy", "4 beams", "temperature 1"):
        names.append(f"{way}: dro_jax, first call")
        if way != "temperature 1":
            names.append(f"{way}: tokens in common")
            assert lines[names[-1]]["median"] == 100
        names += [f"{way}: dro_jax", f"{way}: Hugging Face", f"{way}: dro_jax is faster by"]
    assert list(lines) == names
    for line in lines.values():
        assert 0 < line["least"] <= line["median"] <= line["most"]
