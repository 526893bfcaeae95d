"""The pipeline's benchmark runs from its command line and measures everything that it says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_every_line_has_a_number(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, REPOSITORY / "benchmarks" / "pipeline.py", "--output", output]
    # One device, as a user has it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--rows", "200", "--steps", "2", "--repeats", "1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the data pipeline, 200 rows" in done.stdout
    found = json.loads(output.read_text())
    assert int(found["conditions"]["cores"]) >= 1
    lines = {line["name"]: line for line in found["results"]}
    alone = [
        f"alone: {rows}, from the {source}"
        for rows in ("packed", "one example a row")
        for source in ("cache", "file")
    ]
    ways = ("reading ahead", "reading in the loop", "one batch over and over")
    training = [f"training: {way}{what}" for way in ways for what in ("", ", waiting")]
    epochs = [
        f"an epoch of {rows} rows{what}"
        for rows in ("200", "2,000")
        for what in ("", ": memory before it", ": peak memory")
    ]
    assert list(lines) == [*alone, *training, *epochs]
    for line in lines.values():
        assert line["repeats"] == 1
        assert line["least"] == line["median"] == line["most"] > 0
        assert math.isfinite(line["median"])
    assert all(lines[f"training: {way}, waiting"]["median"] < 100 for way in ways)
