"""Runs a benchmark from its command line, as a user does but with compilation hurried."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRIAL = ["--model=trial", "--batch=2", "--lengths=8/8", "--device=cpu"]
HEAVY = ("seqio", "tensorflow", "tensorflow_datasets", "t5x", "clu", "gin", "torch", "transformers")

# Python imports `sitecustomize` before the program.
BLOCK = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
"""


def run(name: str, *flags: str, output: Path, arrays_alone: bool = False) -> dict[str, Any]:
    """The results file of a benchmark, its lines by name.

    Args:
      name: of the benchmark.
      flags: as a user gives them.
      output: where the results go; beside it lies what blocks imports.
      arrays_alone: whether what reads data or is no part of JAX cannot be imported.
    """
    # One device, as a user has it.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if arrays_alone:
        output.with_name("sitecustomize.py").write_text(BLOCK)
        paths = [str(output.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), f"--output={output}", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["title"] in done.stdout
    for line in found["results"]:
        assert line["name"] in done.stdout
        assert line["least"] <= line["median"] <= line["most"]
    return found | {"results": {line["name"]: line for line in found["results"]}}
