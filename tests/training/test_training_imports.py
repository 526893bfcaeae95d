"""On an accelerator machine the training room runs from arrays alone."""

import subprocess
import sys
from pathlib import Path

MODULES = [
    "algorithms",
    "checkpoints",
    "chips",
    "collectives",
    "cost",
    "loop",
    "optimizers",
    "partitioning",
    "processes",
    "step",
    "train_state",
]
HEAVY = ["clu", "gin", "seqio", "t5x", "tensorflow", "tensorflow_datasets", "torch", "transformers"]


def loaded_by(*imports: str) -> str:
    code = f"import sys\n{';'.join(imports)}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_training_imports_neither_tensorflow_nor_seqio_nor_gin_nor_t5x_nor_clu():
    folder = Path(__file__).parents[2] / "dro_jax" / "training"
    assert sorted(path.stem for path in folder.glob("[!_]*.py")) == MODULES
    assert loaded_by(*(f"import dro_jax.training.{name}" for name in MODULES)) == "[]"
