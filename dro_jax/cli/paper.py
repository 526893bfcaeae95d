"""`dro_jax paper`: the experiments of arXiv 2405.19107 in miniature, on the task whose optimum is known exactly.

Every arm is a gin file of gin_configs/experiments/miniature, trained by `dro_jax train` in a process of its own.
Test prompts are in no feedback file; what is chosen, KTO's tau, is chosen on the validation prompts.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from etils import epath

import dro_jax
from dro_jax.cli import configuration, demo, train
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.generate import load_policy
from dro_jax.cli.run_folder import REFERENCE as OWN_REFERENCE
from dro_jax.cli.run_folder import STATISTICS, make_directory
from dro_jax.data import demonstration
from dro_jax.data.feedback import RewardStatistics, split_of
from dro_jax.errors import DivergenceError, UsageError, check_number
from dro_jax.evaluation import paper_page
from dro_jax.evaluation.enumeration import AnswerScores
from dro_jax.evaluation.experiments import LARGER, REFERENCE, TAU, Measurement, findings_of, size_of
from dro_jax.training.algorithms import Algorithm, DroP, DroV
from dro_jax.training.loop import StopRequest
from dro_jax.whole_files import write_whole

FOLDER = "experiments/miniature"
TEST_FRACTION = 0.1
ANSWERS = "answers.npz"
CONFIG = "config.gin"
"""Of a run, which `dro_jax train` writes."""

SETTINGS = (
    "feedback",
    "model",
    "algorithm",
    "optimizer",
    "lengths",
    "num_steps",
    "batch_size",
    "max_examples",
    "drop_overlong",
    "vocabulary_file",
    "seed",
)
"""Arguments of `train.train` on which what is trained depends, paths apart."""

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
        return Run(size_of(self.arm) + REFERENCE, self.seed)

    @property
    def name(self) -> str:
        """Its folder, below the experiment's."""
        return f"seed_{self.seed}/{self.arm}"


def all_arms() -> list[str]:
    """Names of all arms, their references apart."""
    files = Path(configuration.shipped_configs(), FOLDER).glob("*.gin")
    return sorted({path.stem for path in files} - {"base"} - references())


def references() -> set[str]:
    """What arms start from."""
    return {size + REFERENCE for size in ("", LARGER)}


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
      UsageError: for an arm that there is not, a folder that cannot be written, that another call is at work in, or
        whose runs were trained with other settings.
      DivergenceError: for trainings that failed; the others are done and on the page.
    """
    arms = list(dict.fromkeys(arms or (MAIN_ARMS if quick else all_arms())))
    seeds = list(dict.fromkeys(seeds or (range(1) if quick else range(3))))
    jobs = min(8, len(cores())) if jobs is None else jobs
    check_number("--jobs", jobs, whole=True, at_least=1)
    for seed in seeds:
        check_number("--seeds", seed, whole=True, at_least=0)
    for arm in arms:
        if arm not in all_arms():
            raise UsageError(f"--arms {arm}: choose from {', '.join(all_arms())}")
    directory = epath.Path(workdir)
    make_directory(directory)
    wanted = [Run(arm, seed) for seed in seeds for arm in arms]
    with alone(directory) as lock:
        refuse_other_settings(directory, bindings)
        failures, stopped = train_missing(directory, wanted, jobs, bindings, lock)
        if stopped is not None:
            return stopped
        for line in write_page(directory, bindings, failures):
            console.print(line)
    if failures:
        raise DivergenceError(
            f"{len(failures)} of the trainings failed; see {directory / 'logs'}, and the page has the rest"
        )
    return None


def train_missing(
    directory: epath.Path, wanted: Sequence[Run], jobs: int, bindings: Sequence[str], lock: int
) -> tuple[dict[Run, str], train.Interrupted | None]:
    """Trains and measures runs, and before them their references, where no earlier call did.

    Returns:
      What became of those that failed, and what interrupted it.
    """
    for seed in {each.seed for each in wanted}:
        write_data(directory, seed)
    starts = list(dict.fromkeys(each.reference for each in wanted))
    failures: dict[Run, str] = {}
    finished = 0
    stop = StopRequest()
    with stop.listening(), progress_bar("paper", len(starts) + len(wanted)) as progress:
        for stage in (starts, wanted):
            waiting = [each for each in stage if not (directory / each.name / ANSWERS).exists()]
            ready = [each for each in waiting if each.reference not in failures]
            finished += len(stage) - len(ready)
            progress.update(progress.task_ids[0], completed=finished)
            # Whatever goes wrong here, no training is left behind.
            with contextlib.closing(
                train_all(directory, ready, jobs, bindings, stop, lock)
            ) as trained:
                for done, problem in trained:
                    if problem is None:
                        measure(directory, done)
                    else:
                        failures[done] = problem
                        console.print(f"{done.name}: {problem}")
                    finished += 1
                    progress.update(progress.task_ids[0], completed=finished)
    stopped = None if stop.signal is None else train.Interrupted(finished, stop.signal.name)
    return failures, stopped


def write_page(
    directory: epath.Path, bindings: Sequence[str], failures: Mapping[Run, str]
) -> list[str]:
    """Writes the page of all runs that are there; returns what to tell the person at the terminal."""
    begun = runs_there(directory)
    there = [each for each in begun if (directory / each.name / ANSWERS).exists()]
    missing = {each: "was begun and has not ended" for each in begun if each not in there}
    test, validation = (
        {
            (each.arm, each.seed): read_answers(directory / each.name, split)
            for each in there
            if each != each.reference
        }
        for split in ("test", "validation")
    )
    setting = paper_page.Setting(
        training=training_of(directory, there),
        bindings=bindings,
        failures={each.name: problem for each, problem in {**missing, **failures}.items()},
        versions=f"dro_jax {dro_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        date=datetime.date.today().isoformat(),
    )
    findings = findings_of(test, validation)
    told = [paper_page.headline(findings)]
    for name, text in paper_page.files(findings, setting).items():
        write_whole(directory / name, text)
        told.append(f"page         {directory / name}")
    return told


def training_of(directory: epath.Path, runs: Sequence[Run]) -> str:
    """Length and learning rates of DRO-V, or of the first arm that is there."""
    arms = [each for each in runs if each != each.reference]
    if not arms:
        return "nothing was trained"
    shown = next((each for each in arms if each.arm == "dro_v"), arms[0])
    settings = settings_of(os.fspath(directory / shown.name / CONFIG))
    steps, rows = (settings[f"train.train.{name}"] for name in ("num_steps", "batch_size"))
    policy, value, head = (
        settings[f"Adafactor.{part}_learning_rate"] for part in ("policy", "value", "value_head")
    )
    return (
        f"{steps} steps of {rows} examples, learning rates {policy:g} for the policy, {value:g} for the value network "
        f"and {head:g} for its head"
    )


def runs_there(directory: epath.Path) -> list[Run]:
    """Runs that were begun, of arms that there are."""
    arms = {*all_arms(), *references()}
    places = [path.parent for path in directory.glob(f"seed_*/*/{CONFIG}")]
    found = [
        Run(place.name, int(place.parent.name.removeprefix("seed_")))
        for place in places
        if place.name in arms and place.parent.name.removeprefix("seed_").isdecimal()
    ]
    return sorted(found, key=lambda each: (each.seed, each.arm))


def settings_of(gin_file: str, bindings: Sequence[str] = ()) -> dict[str, Any]:
    """What is trained by a gin file: `SETTINGS` by the names that a person can bind them by."""
    configuration.load([gin_file], bindings)
    bound = configuration.arguments(train.train)
    found: dict[str, Any] = {}
    for name in SETTINGS:
        setting = bound[name]
        if dataclasses.is_dataclass(setting):
            kind = type(setting).__name__
            found[name] = kind
            found |= {f"{kind}.{field}": value for field, value in vars(setting).items()}
        else:
            found[f"train.train.{name}"] = setting
    return found | {"FeedbackFile.path": None}


def refuse_other_settings(directory: epath.Path, bindings: Sequence[str]) -> None:
    """Raises UsageError if a run was begun with other settings than it would be begun with now.

    Runs of one page are to differ in their arms and seeds alone.
    """
    for each in runs_there(directory):
        place = directory / each.name
        before = settings_of(os.fspath(place / CONFIG))
        now = settings_of(arm_file(each), [*macros(directory, each), *bindings])
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"{place}: was trained with {name} = {before.get(name)!r}, and now it is {now.get(name)!r}; choose "
                    "another --workdir, or remove that folder to train it anew"
                )


@contextlib.contextmanager
def alone(directory: epath.Path) -> Iterator[int]:
    """Keeps other calls out of a folder.

    Trainings inherit the lock that this yields, so that one which a killed call left behind keeps them out as well.
    """
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{directory}: another `dro_jax paper`, or a training that one left behind, is at work here; wait "
                "for its end, or choose another --workdir"
            ) from error
        yield file.fileno()


def cores() -> list[int]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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
    demonstration.write_demonstration(
        place, split_prompts()["asked"], samples_per_prompt=demo.ANSWERS_PER_PROMPT, seed=seed
    )


def arm_file(each: Run) -> str:
    """The gin file of a run's arm."""
    return f"{FOLDER}/{each.arm}.gin"


def macros(directory: epath.Path, each: Run) -> list[str]:
    """Gin bindings that make a run of its arm's file."""
    paths = {"FEEDBACK_FILE": data_file(directory, each.seed), "MODEL_DIR": directory / each.name}
    if each != each.reference:
        paths["INIT_CHECKPOINT"] = directory / each.reference.name
    bound = [f"{name} = {str(path)!r}" for name, path in paths.items()]
    return [*bound, f"train.train.seed = {each.seed}"]


def command(directory: epath.Path, each: Run, bindings: Sequence[str]) -> list[str]:
    """The `dro_jax train` of a run."""
    flags = [
        f"--gin.{binding.replace(' = ', '=', 1)}"
        for binding in (*macros(directory, each), *bindings)
    ]
    return ["dro_jax", "train", f"--gin_file={arm_file(each)}", *flags]


def train_all(
    directory: epath.Path,
    runs: Sequence[Run],
    jobs: int,
    bindings: Sequence[str],
    stop: StopRequest,
    lock: int,
) -> Generator[tuple[Run, str | None]]:
    """Trains runs side by side, each in a process on cores of its own.

    Args:
      directory: of the experiment.
      runs: what to train.
      jobs: processes at a time.
      bindings: gin bindings for every training.
      stop: when it says so, the processes are asked to save and leave, and no other is started.
      lock: of `alone`.

    Yields:
      Runs as they end, with what the last line of one that failed says. Closed early, it stops the others.
    """
    make_directory(directory / "logs")
    # Where there are fewer runs each has more cores.
    jobs = min(jobs, len(runs))
    waiting, running = list(runs), dict[int, tuple[Run, subprocess.Popen[bytes]]]()
    asked = False
    try:
        while running or (waiting and stop.signal is None):
            for slot in set(range(jobs)) - set(running):
                if waiting and stop.signal is None:
                    each = waiting.pop(0)
                    running[slot] = each, start(directory, each, bindings, slot, jobs, lock)
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
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def log_file(directory: epath.Path, each: Run) -> epath.Path:
    """What a run's process printed."""
    return directory / "logs" / f"{each.name.replace('/', '_')}.log"


def start(
    directory: epath.Path, each: Run, bindings: Sequence[str], slot: int, jobs: int, lock: int
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
            pass_fds=[lock],
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores()[slot::jobs] or cores())
    return process


def measure(directory: epath.Path, each: Run) -> None:
    """Writes what a run makes of every answer to every validation and test prompt."""
    place = directory / each.name
    # The reference that it started from, whatever became of that run since.
    policy, reference = (
        load_policy(os.fspath(path))
        for path in (place, place if each == each.reference else place / OWN_REFERENCE)
    )
    algorithm = algorithm_of(place)
    arrays: dict[str, np.ndarray] = {}
    for split in ("validation", "test"):
        prompts = split_prompts()[split]
        scores = demo.score_answers(place, algorithm, reference, policy, prompts)
        arrays |= {
            f"{split}/{name}": array for name, array in vars(scores).items() if array is not None
        }
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_whole(place / ANSWERS, content.getvalue())


def algorithm_of(place: epath.Path) -> Algorithm:
    """What the run in a folder was trained by."""
    configuration.load([os.fspath(place / CONFIG)])
    return cast(Algorithm, configuration.arguments(train.train)["algorithm"])


def read_answers(place: epath.Path, split: str) -> Measurement:
    """Reads what `measure` wrote of a split into a run's folder."""
    with np.load(io.BytesIO((place / ANSWERS).read_bytes())) as arrays:
        names = [field.name for field in dataclasses.fields(AnswerScores)]
        found = {name: arrays.get(f"{split}/{name}") for name in names}
    statistics = RewardStatistics.load_json(place / STATISTICS)
    rest = [
        statistics.normalise(demonstration.reward(prompt, "")) for prompt in split_prompts()[split]
    ]
    algorithm = algorithm_of(place)
    # KTO's tau is no regularisation of the reward.
    tau = algorithm.tau if isinstance(algorithm, DroV | DroP) else TAU
    return Measurement(AnswerScores(**found), np.array(rest), tau)
