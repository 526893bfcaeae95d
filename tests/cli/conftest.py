"""The `dro_jax` command inside this process, a tiny model for it, and two runs that many tests look at."""

import contextlib
import dataclasses
import gc
import io
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from dro_jax.cli.main import main
from dro_jax.data import demonstration


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left behind in the terminal."""

    code: Any
    out: str
    err: str


Command = Callable[..., Result]

TINY = {
    "t5.T5Config.vocab_size": 264,
    "t5.T5Config.emb_dim": 16,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 8,
    "t5.T5Config.mlp_dim": 16,
    "t5.T5Config.num_encoder_layers": 1,
    "t5.T5Config.num_decoder_layers": 1,
    "feedback.FeedbackFile.validation_fraction": 0.3,
    "optimizers.Adafactor.warmup_steps": 2,
    "loop.Periods.log": 2,
    "loop.Periods.checkpoint": 4,
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 6,
    "TAU": 0.5,
    "TASK_FEATURE_LENGTHS": {"inputs": 13, "targets": 8},
}


def call(*arguments: str) -> Result:
    """Runs the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def flags(gin_file: str, **settings: Any) -> list[str]:
    """Arguments of `train` for the tiny model; `settings` come last, and None takes one away."""
    # At which a few steps move a policy by more than rounding.
    rates = {} if "sft" in gin_file else {"POLICY_LEARNING_RATE": 1e-4}
    bindings = TINY | rates | {name.replace("__", "."): value for name, value in settings.items()}
    if "sft" in gin_file:
        del bindings["TAU"]
    return [
        "train",
        f"--gin_file={gin_file}",
        *(f"--gin.{name}={value!r}" for name, value in bindings.items() if value is not None),
    ]


@pytest.fixture(scope="session")
def command() -> Command:
    return call


@pytest.fixture(scope="session")
def train_flags() -> Callable[..., list[str]]:
    return flags


@pytest.fixture(scope="session")
def train(feedback_file: Path) -> Command:
    """`dro_jax train` of the tiny model on the made-up file, unless the settings say otherwise."""
    return lambda gin_file="runs/dro_v_tiny.gin", **settings: call(
        *flags(gin_file, **({"FEEDBACK_FILE": str(feedback_file)} | settings))
    )


@pytest.fixture(autouse=True)
def _clean_up() -> Iterator[None]:
    """The command takes over logging, gin and the unraisable hook, as a process of its own may."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.unraisablehook
    yield
    sys.unraisablehook = hook
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("dro_jax", "asyncio", "absl"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    gin.clear_config()


@pytest.fixture
def damaged_reads() -> Iterator[None]:
    """Lets the readers that Orbax leaves behind at a damaged array finish while the command's hooks are there."""
    yield
    time.sleep(0.5)
    gc.collect()


@pytest.fixture(scope="session")
def feedback_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows: 30 prompts of the demonstration, two answers each."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "feedback.jsonl"
    with path.open("w") as file:
        for prompt in rng.choice(demonstration.prompts("abcd"), 30, replace=False):
            for answer in rng.choice(demonstration.answers(prompt), 2, replace=False):
                reward = demonstration.reward(prompt, answer)
                row = {"prompt": str(prompt), "completion": str(answer), "reward": reward}
                file.write(json.dumps(row) + "\n")
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, what it printed, and every batch that went to the devices, in order."""

    directory: Path
    result: Result
    batches: list[dict[str, np.ndarray]]


@contextlib.contextmanager
def watch_batches(interrupt_at: int | None = None) -> Iterator[list[dict[str, np.ndarray]]]:
    """Collects the batches given to the devices; raises SIGINT when a number of them has been."""
    from dro_jax.training import loop

    seen: list[dict[str, np.ndarray]] = []
    original = loop.to_devices

    def to_devices(batch: Any, sharding: Any) -> Any:
        seen.append({name: np.array(array) for name, array in batch.items()})
        if len(seen) == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return original(batch, sharding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "to_devices", to_devices)
        yield seen


@pytest.fixture(scope="session")
def watching() -> Callable[..., contextlib.AbstractContextManager[list[dict[str, np.ndarray]]]]:
    return watch_batches


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory, train: Command) -> Run:
    """Six steps of SFT from random weights."""
    directory = tmp_path_factory.mktemp("runs") / "sft"
    with watch_batches() as batches:
        result = train("runs/sft_tiny.gin", MODEL_DIR=str(directory))
    assert result.code == 0, result.err
    return Run(directory, result, batches)


@pytest.fixture(scope="session")
def dro_v_run(tmp_path_factory: pytest.TempPathFactory, train: Command, sft_run: Run) -> Run:
    """Six steps of DRO-V from the SFT run."""
    directory = tmp_path_factory.mktemp("runs") / "dro_v"
    with watch_batches() as batches:
        result = train(MODEL_DIR=str(directory), INIT_CHECKPOINT=str(sft_run.directory))
    assert result.code == 0, result.err
    return Run(directory, result, batches)
