"""`dro_jax train`: one run, from a feedback file to checkpoints."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from clu import metric_writers
from etils import epath

from dro_jax.cli import configuration, host_memory, win_rates
from dro_jax.cli.console import console, format_metrics, progress_bar
from dro_jax.cli.generate import Policy
from dro_jax.cli.run_data import RunData, cache_facts, check_pairs, read_data
from dro_jax.cli.run_folder import (
    MODEL_GIN,
    REFERENCE,
    STATISTICS,
    VOCABULARY,
    facts_of_reference,
    make_directory,
)
from dro_jax.data import caching
from dro_jax.data.batches import Position, evaluation_batches, train_batches
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.tasks import SHUFFLE_BUFFER_SIZE, feedback_task
from dro_jax.errors import UsageError, check_number
from dro_jax.networks import T5Config
from dro_jax.training import checkpoints, loop, partitioning, processes, step, train_state
from dro_jax.training.algorithms import Algorithm, Examples
from dro_jax.training.optimizers import Adafactor
from dro_jax.whole_files import write_whole

logger = logging.getLogger(__name__)

TERMINAL_METRICS = {
    "loss/sft": "loss",
    "loss/dro": "loss",
    "loss/two_sample_dro": "loss",
    "loss/kto": "loss",
    "loss/dpo": "loss",
    "loss/ipo": "loss",
    "loss/slic": "loss",
    "loss/policy": "policy",
    "loss/value": "value",
    "loss/constant": "best constant",
    "kl/log_ratio_mean": "log-ratio",
    "kl/z0": "z0",
    "pairs/accuracy": "pairs right",
    "value/explained_variance": "explained",
    "reward/log_ratio_correlation": "correlation",
    "grad_norm/policy": "gradient: policy",
    "grad_norm/value": "value",
    "learning_rate/policy": "rate: policy",
    "learning_rate/value": "value",
    "data/padding_fraction": "padding",
    "speed/examples_per_second": "examples/s",
    "speed/tokens_per_second": "tokens/s",
}

SIDE_BY_SIDE = {
    "side_by_side/win_rate": "win rate over the reference",
    "side_by_side/win_rate_standard_error": "standard error",
    "side_by_side/ties": "ties",
    "side_by_side/no_verdict": "no verdict",
    "side_by_side/unanswered": "not answered",
}

STEP_0_SPREAD = 0.05
"""Nats by which log pi and log pi_ref may differ before the first update, when they are the same weights."""


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """A run that stopped early because it was asked to; everything is saved."""

    step: int
    signal: str


def train(
    *,
    model_dir: str,
    feedback: FeedbackFile,
    model: T5Config,
    algorithm: Algorithm,
    optimizer: Adafactor,
    lengths: Mapping[str, int],
    num_steps: int,
    batch_size: int,
    microbatches: int = 1,
    max_examples: int = 1,
    init_checkpoint: str | None = None,
    vocabulary_file: str | None = None,
    cache_dir: str | None = None,
    drop_overlong: bool = False,
    seed: int = 0,
    periods: loop.Periods,
    keep_last: int = 3,
    keep_every: int | None = None,
    stall_seconds: float = 1800,
    compilation_cache_dir: str | None = None,
    win_rate: win_rates.WinRate,
    rules: partitioning.Partitioning,
) -> Interrupted | None:
    """Trains a method on a feedback file, going on where `model_dir` left off.

    Args:
      model_dir: folder of the run: checkpoint_<step>/, reference/, train/ and training_eval/ (TensorBoard),
        config.gin, reward_statistics.json.
      feedback: the file, and how to judge and split it.
      model: shape of policy, reference and value network.
      algorithm: the method.
      optimizer: its optimiser.
      lengths: most tokens of "inputs" and "targets".
      num_steps: optimiser steps of the whole run.
      batch_size: rows a step, over all devices.
      microbatches: parts a batch is worked through in, to save memory; the numbers stay the same.
      max_examples: the most examples a row holds: 1 is one example a row, more is packed rows.
      init_checkpoint: a run or checkpoint whose policy is the reference and the start; None for random
        weights.
      vocabulary_file: a SentencePiece model; None for bytes.
      cache_dir: of `dro_jax cache`, run with the same settings: the rows come from there, and the reference is
        not kept in memory. None reads `feedback`.
      drop_overlong: leave out completions over the limit instead of cutting them.
      seed: of initialisation and data order.
      periods: how often to log, evaluate and save.
      keep_last: newest checkpoints to keep.
      keep_every: keep checkpoints at multiples of this for ever; None keeps only the newest.
      stall_seconds: the longest that a step, an answer or a verdict of its evaluation, or its saving may take: after
        that the process ends, as one of several that waits for another would wait for ever.
      compilation_cache_dir: where compiled programs are kept, so that a later start with the same settings, versions
        and devices need not compile them; None keeps none. Whoever may write there may have this process run
        anything.
      win_rate: whether and how a judge holds the policy against the reference at every evaluation; the checkpoint
        that wins most is kept, and is MODEL_DIR/best.
      rules: mesh and sharding.

    Returns:
      None when the run is complete, else what interrupted it.

    Raises:
      UsageError: for anything wrong with files or settings, before anything is written or a network compiled.
      DivergenceError: for a loss or gradient that is not finite.
    """
    # 1. Everything a person can have got wrong, before anything is written (but in place of what is damaged) or a
    # network compiled.
    mesh = rules.mesh()

    def check() -> RunData:
        check_settings(
            model_dir,
            num_steps,
            max_examples,
            seed,
            keep_last,
            keep_every,
            stall_seconds,
            compilation_cache_dir,
        )
        partitioning.check_batch_size(
            batch_size, mesh, rules, microbatches, pairs=algorithm.needs.pairs
        )
        data = read_data(
            feedback, model, algorithm, lengths, vocabulary_file, cache_dir, drop_overlong
        )
        check_pairs(algorithm.needs, batch_size, max_examples, data.summary)
        return data

    data = processes.agree(check)
    if compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", compilation_cache_dir)
    directory = epath.Path(model_dir)
    jury = processes.agree(
        lambda: win_rates.prepare(win_rate, directory, feedback, periods, algorithm.needs)
    )
    processes.refuse_differences("feedback file", data.summary.digest)
    needs, model, summary, manifest = (
        algorithm.needs,
        data.model,
        data.summary,
        data.manifest,
    )
    meta: checkpoints.Meta = {
        "model": model.architecture(),
        "reserved_entry": model.reserved_entry,
        "vocabulary": data.vocabulary_digest,
        "algorithm": algorithm.name,
        "dtype": model.dtype,
        "lengths": dict(lengths),
        # What a resumed run had better not change.
        "settings": {
            "BATCH_SIZE": batch_size,
            "MAX_EXAMPLES": max_examples,
            "TASK_FEATURE_LENGTHS": dict(lengths),
            "INIT_CHECKPOINT": init_checkpoint,
            "seed": seed,
            "drop_overlong": drop_overlong,
            "CACHE_DIR": cache_dir,
            "T5Config.dtype": model.dtype,
            **{f"FeedbackFile.{name}": value for name, value in vars(feedback).items()},
            **{f"Adafactor.{name}": value for name, value in vars(optimizer).items()},
            **{name.upper(): value for name, value in vars(algorithm).items()},
            # Win rates of two judges, prompts or temperatures are not comparable.
            **(win_rate.settings(jury.name) if jury is not None else {}),
        },
    }
    transforms = optimizer.transforms()
    layout = train_state.make_layout(
        model, transforms, has_value=needs.value == "network", mesh=mesh, rules=rules
    )
    state, reference = restore(
        directory, layout, algorithm, init_checkpoint, meta, cached=manifest is not None
    )
    digest: str | None = None
    if needs.reference and reference is not None:
        digest = checkpoints.weights_digest(reference)
    elif needs.reference and state is not None:
        digest = checkpoints.read_meta(directory, int(state.step)).get("reference")
    if cache_dir is not None and manifest is not None:
        if needs.reference and digest is None:
            raise UsageError(f"{cache_dir}: give the INIT_CHECKPOINT that the cache was made with")
        facts = cache_facts(
            feedback,
            model,
            needs,
            lengths,
            data.vocabulary_digest,
            drop_overlong,
            digest,
            data.rows,
        )
        caching.refuse_differences(epath.Path(cache_dir), manifest.facts, facts)
    processes.agree(lambda: make_directory(directory))
    for line in (
        *summary.describe().splitlines(),
        data.overlong.describe(drop_overlong=drop_overlong),
    ):
        console.print(line)

    # 2. The state: restored, or started from the reference. A resumed run keeps the reward statistics that it
    # began with.
    statistics = summary.rewards
    if state is None:
        if reference is None:
            reference = train_state.init_reference(model, seed, layout)
            if needs.reference:
                digest = checkpoints.weights_digest(reference)
                logger.warning(
                    "no INIT_CHECKPOINT: the reference has random weights, which suits a trial only"
                )
        state = train_state.init_state(model, transforms, reference, seed, layout)
        if processes.is_first():
            statistics.save_json(directory / STATISTICS)
        if needs.reference:
            checkpoints.save_policy(directory / REFERENCE, reference, meta)
    else:
        statistics = RewardStatistics.load_json(directory / STATISTICS)
    hold_against_reference = None
    if jury is not None:
        if reference is None:
            abstract = layout.abstract().policy
            reference = restore_reference(directory, init_checkpoint, digest, abstract, meta)
        hold_against_reference = win_rates.against_reference(
            win_rate,
            jury,
            folder=directory / win_rates.FOLDER,
            policy_of=lambda params: Policy(
                model, params, data.vocabulary, dict(lengths), mesh, rules.rules
            ),
            reference=reference,
        )
    meta["reference"] = digest
    if not needs.reference or manifest is not None:
        reference = None
    first_step, position = int(state.step), Position()
    if first_step >= num_steps:
        console.print(f"{directory}: already at step {first_step} of {num_steps}")
        return None
    if first_step:
        console.print(f"{directory}: goes on from step {first_step}")
        saved = checkpoints.read_meta(directory, first_step)
        position = Position(**saved["data"])
        warn_of_changes(saved, meta)

    # 3. The data.
    if statistics != summary.rewards and manifest is not None:
        raise UsageError(
            f"{cache_dir}: its rewards are normalised otherwise than those this run began with; choose another "
            "MODEL_DIR, or the cache it began with"
        )
    if statistics != summary.rewards:
        logger.warning(
            "the training rows of %s are not those this run began with (mean reward %.6g, then %.6g): "
            "rewards are normalised as before, but what follows is not what was left of them",
            feedback.path,
            summary.rewards.mean,
            statistics.mean,
        )
    rows = summary.num_input_examples["train"]
    if cache_dir is None and rows > SHUFFLE_BUFFER_SIZE:
        console.print(
            f"{rows} training rows are shuffled {SHUFFLE_BUFFER_SIZE} at a time, in the order of the file: if it is "
            "sorted by source or reward, shuffle it, or train from what `dro_jax cache` makes"
        )
    task = feedback_task(
        feedback,
        vocabulary=data.vocabulary,
        statistics=statistics,
        num_input_examples=summary.num_input_examples,
        min_reward=summary.top_reward,
        mismatched=needs.mismatched,
        prompt_ids=needs.pairs,
        drop_overlong=drop_overlong,
    )
    seqio.set_global_cache_dirs([] if cache_dir is None else [cache_dir])

    # 4. What lies beside the checkpoints, written by one process.
    names = ("train", "training_eval") if processes.is_first() else ()
    opened = contextlib.ExitStack()
    writers = [metric_writers.SummaryWriter(str(directory / name)) for name in names]
    for writer in writers:
        opened.callback(writer.close)
    if processes.is_first():
        if vocabulary_file is not None:
            write_whole(directory / VOCABULARY, epath.Path(vocabulary_file).read_bytes())
        configuration.save_operative(directory / "config.gin")
    manager = checkpoints.open_manager(directory, keep_last=keep_last, keep_every=keep_every)
    # However the run ends, a checkpoint that was begun is finished.
    opened.callback(checkpoints.close, manager)

    # 5. Training.
    def log(done: int, metrics: loop.Scalars) -> None:
        for writer in writers[:1]:
            writer.write_scalars(done, metrics)
        console.print(f"step {done}/{num_steps}  {format_metrics(metrics, TERMINAL_METRICS)}")
        if done == 1 and needs.reference:
            spread = metrics["kl/log_ratio_std"]
            console.print(f"log-ratio at step 0: standard deviation {spread:.2g} nats")
            if spread > STEP_0_SPREAD:
                logger.warning(
                    "policy and reference are the same weights, yet their log-probabilities differ by "
                    "%.2g nats: raise the compute precision (T5Config.dtype)",
                    spread,
                )

    evaluation_step = step.make_evaluation_step(model, algorithm, layout)
    batch_sharding = partitioning.batch_sharding(mesh, rules.rules)

    rates: dict[int, float] = {}
    stop = loop.StopRequest()

    def go_on() -> None:
        alive()
        stop.leave_evaluation()

    def evaluate(done: int, state: train_state.TrainState) -> None:
        host_memory.give_back_freed_memory()
        if hold_against_reference is not None and (
            scalars := hold_against_reference(done, state.policy, go_on)
        ):
            if "side_by_side/win_rate" in scalars:
                rates[done] = scalars["side_by_side/win_rate"]
            for writer in writers[1:]:
                writer.write_scalars(done, scalars)
            console.print(f"side by side, step {done}  {format_metrics(scalars, SIDE_BY_SIDE)}")
        if not summary.validation_rows:
            return
        arrays = []
        for batch in evaluation_batches(
            task,
            split="validation",
            lengths=lengths,
            # What is too much for a step is too much here.
            batch_size=batch_size // microbatches,
            max_examples=max_examples,
        ):
            go_on()
            placed = loop.to_devices(batch, batch_sharding)
            arrays.append(jax.device_get(evaluation_step(state, reference, placed)))
        if not arrays:
            logger.warning("nothing held out is left to evaluate: no pair, or none short enough")
            return
        metrics = held_out_metrics(algorithm, jax.tree.map(lambda *x: np.concatenate(x), *arrays))
        for writer in writers[1:]:
            writer.write_scalars(done, metrics)
        console.print(f"held out, step {done}  {format_metrics(metrics, TERMINAL_METRICS)}")

    def save(state: train_state.TrainState, position: Position) -> None:
        alive()
        host_memory.give_back_freed_memory()
        checkpoints.save(
            manager,
            state,
            meta | {"data": dataclasses.asdict(position)},
            win_rate=rates.get(int(state.step)),
        )

    with (
        stop.listening(),
        opened,
        processes.ended_when_stalled(stall_seconds) as alive,
        progress_bar(f"{algorithm.name} training", num_steps, first_step) as progress,
    ):

        def show(done: int) -> None:
            alive()
            progress.update(progress.task_ids[0], completed=done)

        state = loop.train(
            state,
            reference,
            train_step=step.make_train_step(
                model, algorithm, transforms, optimizer.schedules(), layout, microbatches
            ),
            batches=train_batches(
                task,
                lengths=lengths,
                batch_size=batch_size,
                seed=seed,
                max_examples=max_examples,
                start=position,
            ),
            batch_sharding=batch_sharding,
            num_steps=num_steps,
            periods=periods,
            log=log,
            evaluate=evaluate,
            save=save,
            stop=stop,
            progress=show,
        )
    if int(state.step) < num_steps:
        assert stop.signal is not None
        return Interrupted(int(state.step), stop.signal.name)
    return None


def check_settings(
    model_dir: str,
    num_steps: int,
    max_examples: int,
    seed: int,
    keep_last: int,
    keep_every: int | None,
    stall_seconds: float,
    compilation_cache_dir: str | None,
) -> None:
    """Raises UsageError for a setting of `train` that means nothing."""
    if not isinstance(model_dir, str):
        raise UsageError(f"MODEL_DIR is {model_dir!r}: give a path, as in \"'out'\"")
    check_number("TRAIN_STEPS", num_steps, whole=True, at_least=1)
    check_number("MAX_EXAMPLES", max_examples, whole=True, at_least=1)
    check_number("train.seed", seed, whole=True)
    check_number("train.keep_last", keep_last, whole=True, at_least=1)
    check_number("train.stall_seconds", stall_seconds, above=0)
    if not isinstance(compilation_cache_dir, str | None):
        raise UsageError(
            f"train.compilation_cache_dir is {compilation_cache_dir!r}: give a path, or None"
        )
    if keep_every is not None:
        check_number("train.keep_every", keep_every, whole=True, at_least=1)


def warn_of_changes(then: checkpoints.Meta, now: checkpoints.Meta) -> None:
    """Warns where a resumed run has other settings than the one that saved its checkpoint."""
    before = then.get("settings", {})
    for name, value in now["settings"].items():
        if name in before and before[name] != value:
            logger.warning(
                "%s was %r when this run began and is %r now: it does not go on as it would have",
                name,
                before[name],
                value,
            )


def restore(
    directory: epath.Path,
    layout: train_state.Layout,
    algorithm: Algorithm,
    init_checkpoint: str | None,
    meta: checkpoints.Meta,
    *,
    cached: bool,
) -> tuple[train_state.TrainState | None, Any]:
    """The state and the reference that are on disk, None for what is not.

    Args:
      directory: of the run; its newest whole checkpoint is the state.
      layout: of the state.
      algorithm: whether it has a reference.
      init_checkpoint: where a run finds its reference that has not begun, or has lost its own copy.
      meta: what the checkpoints have to belong to.
      cached: whether the data bring the reference's log-probabilities, so that only a start needs it.

    Returns:
      State and reference.

    Raises:
      UsageError: if they are damaged or belong to another model, vocabulary or method.
    """
    abstract = layout.abstract()
    model = facts_of_reference(meta)
    state = checkpoints.restore_latest(
        directory, abstract, model | {"algorithm": meta["algorithm"]}
    )
    if state is not None and (cached or not algorithm.needs.reference):
        return state, None
    if state is not None:
        digest = checkpoints.read_meta(directory, int(state.step)).get("reference")
        return state, restore_reference(directory, init_checkpoint, digest, abstract.policy, meta)
    if algorithm.needs.reference:
        check_place_of_reference(directory / REFERENCE, init_checkpoint)
    if init_checkpoint is None:
        return None, None
    source, at = checkpoints.find(init_checkpoint)
    return None, checkpoints.restore_policy(source, at, abstract.policy, model)


def check_place_of_reference(own: epath.Path, init_checkpoint: str | None) -> None:
    """Raises UsageError where a run's reference would come to lie on or among other checkpoints than its own."""
    init = None if init_checkpoint is None else epath.Path(init_checkpoint).absolute()
    inside = init is not None and own.absolute() in (init, *init.parents)
    if inside or checkpoints.steps(own) not in ([], [0]) or (own / MODEL_GIN).exists():
        raise UsageError(
            f"{own}: the run's reference is to be kept there, and another run or model is: choose another MODEL_DIR"
        )


def restore_reference(
    directory: epath.Path,
    init_checkpoint: str | None,
    digest: str | None,
    abstract: Any,
    meta: checkpoints.Meta,
) -> Any:
    """The reference of a run that has begun; where its own copy is damaged, gone or another, it is made again.

    Args:
      directory: of the run.
      init_checkpoint: where the run found its reference.
      digest: `checkpoints.weights_digest` of the reference.
      abstract: shapes and shardings to restore into.
      meta: what the reference has to belong to.

    Returns:
      Its parameters.

    Raises:
      UsageError: if neither the run nor `init_checkpoint` has them any more.
      SaveError: if the copy cannot be written.
    """
    expected, own = facts_of_reference(meta), directory / REFERENCE
    advice = "give the INIT_CHECKPOINT that the run began with, or choose another MODEL_DIR"
    fault = f"{own}: the run's reference is not there any more"
    if 0 in checkpoints.steps(own):
        try:
            if checkpoints.policy_digest(checkpoints.read_meta(own, 0)) == digest:
                return checkpoints.restore_policy(own, 0, abstract, expected)
            fault = f"{checkpoints.path_of(own, 0)}: has other weights than the run's reference"
        except checkpoints.DamagedError as error:
            # Its text alone: with its frames it would keep the damaged arrays.
            fault = str(error)
    if init_checkpoint is None:
        raise UsageError(f"{fault}: {advice}")
    try:
        source, at = checkpoints.find(init_checkpoint)
        has_its_weights = checkpoints.policy_digest(checkpoints.read_meta(source, at)) == digest
    except UsageError as error:
        raise UsageError(f"{fault}, and {error}") from error
    if not has_its_weights:
        path = checkpoints.path_of(source, at)
        raise UsageError(f"{fault}, and {path} has other weights: {advice}")
    reference = checkpoints.restore_policy(source, at, abstract, expected)
    copy = checkpoints.path_of(own, 0)
    if processes.is_first() and copy.exists():
        checkpoints.move_aside(copy, fault)
    logger.warning("%s: was lost, and is copied again from %s", own, init_checkpoint)
    checkpoints.save_policy(own, reference, meta)
    return reference


def held_out_metrics(algorithm: Algorithm, examples: Examples) -> loop.Scalars:
    """Metrics of a whole split: the method's own, and the loss of eq. 4 that asks for no learning.

    Args:
      algorithm: the method.
      examples: NumPy arrays [rows, N] of the split.

    Returns:
      Metrics; where they have eq. 4's loss also "loss/constant", eq. 4 at pi = pi_ref and the best constant V, which is
      half of the rewards' variance.
    """
    _, metrics = jax.jit(algorithm.loss)(jax.tree.map(jnp.asarray, examples))
    scalars = {name: float(value) for name, value in metrics.items()}
    if "loss/dro" in scalars:
        rewards = np.asarray(examples.reward, np.float64)[np.asarray(examples.weights) > 0]
        scalars["loss/constant"] = float(rewards.var() / 2)
    return scalars
