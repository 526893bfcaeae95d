"""Small models that Hugging Face transformers wrote, and what it computes with them (make_directories.py)."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@dataclasses.dataclass(frozen=True)
class Golden:
    """A folder and the arrays beside it."""

    folder: Path
    arrays: dict[str, np.ndarray]


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return Golden(GOLDEN / name, dict(file))


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A golden folder that a test may damage."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))
