"""`dro_jax paper`: the experiments of arXiv 2405.19107 in miniature, on the task whose optimum is known exactly.

Every arm is a gin file of gin_configs/experiments/miniature, trained by `dro_jax train` in a process of its own.
Test prompts are in no feedback file; what is chosen, KTO's tau, is chosen on the validation prompts.
"""

import dataclasses
import datetime
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

import dro_jax
from dro_jax.cli import configuration, demo, train
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.generate import load_policy
from dro_jax.cli.run_folder import make_directory
from dro_jax.data import demonstration
from dro_jax.data.feedback import split_of
from dro_jax.errors import DivergenceError, UsageError, check_number
from dro_jax.evaluation import paper_page
from dro_jax.evaluation.enumeration import AnswerScores
from dro_jax.evaluation.experiments import LARGER, REFERENCE
from dro_jax.training.loop import StopRequest

FOLDER = "experiments/miniature"
TEST_FRACTION = 0.1
ANSWERS = "answers.npz"

MAIN_ARMS = (
    "dro_v",
    "dro_v_single_value",
    "dro_v_single_net",
    "dro_v_single_net_single_value",
    "dro_p",
    "kto",
)
"""What `--quick` trains."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm, a file of gin_configs/experiments/miniature without its ending, with one seed."""

    arm: str
    seed: int

    @property
    def reference(self) -> "Run":
        """The run whose policy it starts from."""
        size = LARGER if self.arm.startswith(LARGER) else ""
        return Run(size + REFERENCE, self.seed)

    @property
    def name(self) -> str:
        """Its folder, below the experiment's."""
        return f"seed_{self.seed}/{self.arm}"


def all_arms() -> list[str]:
    """Names of all arms, their references apart."""
    files = Path(configuration.shipped_configs(), FOLDER).glob("*.gin")
    return sorted({path.stem for path in files} - {"base", REFERENCE, LARGER + REFERENCE})


def run(
    workdir: str,
    *,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    quick: bool,
    jobs: int | None,
    bindings: Sequence[str],
) -> train.Interrupted | None:
    """Trains the arms that are not trained yet, measures them, and writes the page of all that is there.

    Args:
      workdir: folder for everything it writes.
      arms: of `all_arms`; None for all, or for `MAIN_ARMS` if `quick`.
      seeds: each trains every arm once, on data and from a reference of its own; None for three, or one if `quick`.
      quick: fewer arms and seeds.
      jobs: trainings at a time, each on its share of the cores; None for one a core, at most eight.
      bindings: gin bindings for every training.

    Returns:
      None, or what interrupted it, with the number of trainings done.

    Raises:
      UsageError: for an arm that there is not, or a folder that cannot be written.
      DivergenceError: for trainings that failed; the others are done and on the page.
    """
    arms = arms or (MAIN_ARMS if quick else all_arms())
    seeds = seeds or (range(1) if quick else range(3))
    jobs = min(8, os.cpu_count() or 1) if jobs is None else jobs
    check_number("--jobs", jobs, whole=True, at_least=1)
    for seed in seeds:
        check_number("--seeds", seed, whole=True, at_least=0)
    for arm in arms:
        if arm not in all_arms():
            raise UsageError(f"--arms {arm}: choose from {', '.join(all_arms())}")
    directory = epath.Path(workdir)
    make_directory(directory)
    for seed in seeds:
        write_data(directory, seed)
    wanted = [Run(arm, seed) for seed in seeds for arm in arms]
    references = sorted({each.reference for each in wanted}, key=lambda r: r.name)
    failures: dict[Run, str] = {}
    finished = 0
    stop = StopRequest()
    with (
        stop.listening(),
        progress_bar("paper", len(references) + len(wanted)) as progress,
    ):
        for stage in (references, wanted):
            waiting = [each for each in stage if not is_measured(directory, each, bindings)]
            ready = [each for each in waiting if each.reference not in failures]
            finished += len(stage) - len(ready)
            progress.update(progress.task_ids[0], completed=finished)
            for done, problem in train_all(directory, ready, jobs, bindings, stop):
                if problem is None:
                    measure(directory, done)
                else:
                    failures[done] = problem
                    console.print(f"{done.name}: {problem}")
                finished += 1
                progress.update(progress.task_ids[0], completed=finished)
    if stop.signal is not None:
        return train.Interrupted(finished, stop.signal.name)
    scores = {
        split: {
            (path.parent.name, int(path.parent.parent.name.removeprefix("seed_"))): read_answers(
                path, split
            )
            for path in sorted(directory.glob(f"seed_*/*/{ANSWERS}"))
        }
        for split in ("validation", "test")
    }
    failed = {each.name: problem for each, problem in failures.items()}
    conditions = (
        f"dro_jax {dro_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}, "
        f"{datetime.date.today().isoformat()}"
    )
    for line in paper_page.write(
        directory, scores["test"], scores["validation"], failed, conditions
    ):
        console.print(line)
    if failures:
        raise DivergenceError(
            f"{len(failures)} of the trainings failed; see {directory / 'logs'}, and the page has the rest"
        )
    return None


def split_prompts() -> dict[str, list[str]]:
    """The prompts of the feedback files, with their validation part, and the test prompts, which no file has.

    Validation prompts are those that `dro_jax demo` holds out, on which its settings, which are these arms' too, were
    looked at. So no test prompt is among them.
    """
    trained, held_out = demonstration.split_prompts(
        demonstration.prompts(), demo.VALIDATION_FRACTION
    )
    test = {
        prompt for prompt in trained if split_of(f"test {prompt}", TEST_FRACTION) == "validation"
    }
    return {
        "asked": [prompt for prompt in demonstration.prompts() if prompt not in test],
        "validation": held_out,
        "test": sorted(test),
    }


def data_file(directory: epath.Path, seed: int) -> epath.Path:
    """Where `write_data` puts a seed's feedback."""
    return directory / f"seed_{seed}" / "feedback.jsonl"


def write_data(directory: epath.Path, seed: int) -> None:
    """Writes the feedback that the arms of a seed are trained on, once."""
    place = data_file(directory, seed)
    if place.exists():
        return
    make_directory(place.parent)
    partial = place.parent / f"{place.name}.partial"
    demonstration.write_demonstration(
        partial, split_prompts()["asked"], samples_per_prompt=demo.ANSWERS_PER_PROMPT, seed=seed
    )
    partial.replace(place)


def command(directory: epath.Path, each: Run, bindings: Sequence[str]) -> list[str]:
    """The `dro_jax train` of a run."""
    macros = {"FEEDBACK_FILE": data_file(directory, each.seed), "MODEL_DIR": directory / each.name}
    if each != each.reference:
        macros["INIT_CHECKPOINT"] = directory / each.reference.name
    flags = [f"--gin.{name}={str(value)!r}" for name, value in macros.items()]
    flags += [f"--gin.train.train.seed={each.seed}"]
    flags += [f"--gin.{binding.replace(' = ', '=')}" for binding in bindings]
    return ["dro_jax", "train", f"--gin_file={FOLDER}/{each.arm}.gin", *flags]


def train_all(
    directory: epath.Path,
    runs: Sequence[Run],
    jobs: int,
    bindings: Sequence[str],
    stop: StopRequest,
) -> Iterator[tuple[Run, str | None]]:
    """Trains runs side by side, each in a process on cores of its own.

    Args:
      directory: of the experiment.
      runs: what to train.
      jobs: processes at a time.
      bindings: gin bindings for every training.
      stop: when it says so, the processes are asked to save and leave, and no other is started.

    Yields:
      Runs as they end, with what the last line of one that failed says.
    """
    make_directory(directory / "logs")
    waiting, running = list(runs), dict[int, tuple[Run, subprocess.Popen[bytes]]]()
    asked = False
    while running or (waiting and stop.signal is None):
        for slot in set(range(jobs)) - set(running):
            if waiting and stop.signal is None:
                each = waiting.pop(0)
                running[slot] = each, start(directory, each, bindings, slot, jobs)
        if stop.signal is not None and not asked:
            asked = True
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        for slot, (each, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            if process.returncode == 0:
                yield each, None
            elif stop.signal is None:
                lines = log_file(directory, each).read_text().strip().splitlines()
                yield each, lines[-1] if lines else f"ended with code {process.returncode}"


def log_file(directory: epath.Path, each: Run) -> epath.Path:
    """What a run's process printed."""
    return directory / "logs" / f"{each.name.replace('/', '_')}.log"


def start(
    directory: epath.Path, each: Run, bindings: Sequence[str], slot: int, jobs: int
) -> "subprocess.Popen[bytes]":
    """Starts a run's process on the cores of a slot."""
    program = command(directory, each, bindings)
    environment = os.environ | {
        # Arms differ in numbers, hardly in programs.
        "JAX_COMPILATION_CACHE_DIR": os.fspath(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log_file(directory, each).open("wb") as log:
        log.write(f"{shlex.join(program)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "dro_jax.cli.main", *program[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, cores[slot::jobs] or cores)
    return process


def is_measured(directory: epath.Path, each: Run, bindings: Sequence[str]) -> bool:
    """Whether an earlier call trained a run by the same command, and measured it."""
    log = log_file(directory, each)
    return (
        (directory / each.name / ANSWERS).exists()
        and log.exists()
        and log.read_text().startswith(f"{shlex.join(command(directory, each, bindings))}\n")
    )


def measure(directory: epath.Path, each: Run) -> None:
    """Writes what a run makes of every answer to every validation and test prompt."""
    place = directory / each.name
    policy, reference = (load_policy(str(directory / r.name)) for r in (each, each.reference))
    configuration.load(
        [f"{FOLDER}/{each.arm}.gin"], ["FEEDBACK_FILE = ''", f"MODEL_DIR = {str(place)!r}"]
    )
    algorithm = configuration.arguments(train.train)["algorithm"]
    arrays: dict[str, np.ndarray] = {}
    for split in ("validation", "test"):
        prompts = split_prompts()[split]
        scores = demo.score_answers(place, algorithm, reference, policy, prompts)
        arrays |= {
            f"{split}/{name}": array for name, array in vars(scores).items() if array is not None
        }
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    partial = place / f"{ANSWERS}.partial"
    partial.write_bytes(content.getvalue())
    partial.replace(place / ANSWERS)


def read_answers(path: epath.Path, split: str) -> AnswerScores:
    """Reads what `measure` wrote of a split."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        names = [field.name for field in dataclasses.fields(AnswerScores)]
        found = {name: arrays.get(f"{split}/{name}") for name in names}
    return AnswerScores(**found)
