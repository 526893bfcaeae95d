"""`dro_jax demo`: the whole road on a task whose optimum is known exactly.

Makes the data, trains the reference by SFT and the policy by DRO-V (or another algorithm) from it, samples
both on held-out prompts, and measures everything against eq. 2 by enumerating the answers.
"""

import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.table import Table

from dro_jax.cli import configuration, train
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.generate import Policy, complete, layout_of, load_policy
from dro_jax.cli.run_folder import STATISTICS, make_directory
from dro_jax.data import demonstration
from dro_jax.data.feedback import RewardStatistics
from dro_jax.data.vocabulary import encode_completion, encode_prompt
from dro_jax.errors import UsageError
from dro_jax.evaluation.enumeration import (
    AnswerScores,
    Distance,
    distance_to_optimum,
    renormalise,
)
from dro_jax.evaluation.sampling import Decoding
from dro_jax.training import checkpoints
from dro_jax.training.algorithms import Algorithm, DroV
from dro_jax.training.step import example_arrays, sequence_log_prob
from dro_jax.whole_files import write_whole

SUMMARY = "summary.json"
VALIDATION_FRACTION = 0.1
"""As the gin files of the demonstration have it."""

ANSWERS_PER_PROMPT = 7
SAMPLES_PER_PROMPT = 8
SAMPLING_BATCH_SIZE = 256
SHOWN_PROMPTS = 10
TAU = 1.0


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where the demonstration writes."""

    data: epath.Path
    sft: epath.Path
    aligned: epath.Path
    samples: epath.Path
    summary: epath.Path


ALGORITHMS = (
    "dro_v",
    "dro_v_single_value",
    "dro_v_single_net",
    "dro_v_single_net_single_value",
    "dro_v_per_token",
    "dro_p",
    "dro_two_sample",
    "kto",
    "kto_labels",
    "dpo",
    "ipo",
    "slic",
    "sft_filtered",
)
"""Files of gin_configs/algorithms/ that start from a reference."""


def run(workdir: str, algorithm: str) -> train.Interrupted | None:
    """Runs the demonstration, going on where an earlier call left off.

    Args:
      workdir: folder for everything it writes; the reference in it serves every algorithm.
      algorithm: one of `ALGORITHMS`, or "all" for each in turn and a table of them.

    Returns:
      None, or what interrupted one of the trainings.
    """
    if algorithm not in (*ALGORITHMS, "all"):
        raise UsageError(f"--algorithm {algorithm}: choose one of {', '.join(ALGORITHMS)}, all")
    if algorithm != "all":
        return run_one(workdir, algorithm)
    for name in ALGORITHMS:
        interrupted = run_one(workdir, name)
        if interrupted is not None:
            return interrupted
    compare(epath.Path(workdir))
    return None


def run_one(workdir: str, algorithm: str) -> train.Interrupted | None:
    """`run` for one algorithm."""
    started = time.perf_counter()
    directory = epath.Path(workdir)
    paths = Paths(
        data=directory / "feedback.jsonl",
        sft=directory / "sft",
        aligned=directory / algorithm,
        samples=directory / "samples.jsonl",
        summary=directory / SUMMARY,
    )
    make_directory(directory)
    if not paths.data.exists():
        demonstration.write_demonstration(
            paths.data, demonstration.prompts(), samples_per_prompt=ANSWERS_PER_PROMPT, seed=0
        )

    console.rule("1. The reference: supervised fine-tuning on the behaviour policy's answers")
    interrupted = train_from(
        ["runs/demo_sft.gin"], FEEDBACK_FILE=str(paths.data), MODEL_DIR=str(paths.sft)
    )
    if interrupted is None:
        console.rule(f"2. {algorithm} from the reference")
        interrupted = train_from(
            ["runs/demo_align.gin", f"algorithms/{algorithm}.gin"],
            FEEDBACK_FILE=str(paths.data),
            MODEL_DIR=str(paths.aligned),
            INIT_CHECKPOINT=str(paths.sft),
        )
    if interrupted is not None:
        return interrupted

    console.rule("3. Both policies on held-out prompts")
    _, held_out = demonstration.split_prompts(demonstration.prompts(), VALIDATION_FRACTION)
    reference, policy = load_policy(str(paths.sft)), load_policy(str(paths.aligned))
    method = configuration.arguments(train.train)["algorithm"]
    scores = score_answers(paths.aligned, method, reference, policy, held_out)
    distance = distance_to_optimum(scores, TAU)
    samples = sample_side_by_side(algorithm, reference, policy, held_out)
    summary = write_results(paths, algorithm, samples, distance, time.perf_counter() - started)
    show(paths, samples, summary)
    return None


def train_from(gin_files: list[str], **macros: Any) -> train.Interrupted | None:
    """What `dro_jax train --gin_file=… --gin.NAME=VALUE …` does."""
    bindings = [f"{name} = {value!r}" for name, value in macros.items()]
    files = " ".join(f"--gin_file={path}" for path in gin_files)
    flags = " ".join(f'--gin.{name}="{value!r}"' for name, value in macros.items())
    console.print(f"dro_jax train {files} {flags}", style="dim")
    configuration.load(gin_files, bindings)
    return configuration.bound(train.train)()


def score_answers(
    run_directory: epath.Path,
    algorithm: Algorithm,
    reference: Policy,
    policy: Policy,
    prompts: list[str],
) -> AnswerScores:
    """Scores every answer to every prompt by both policies, the run's value and the true reward.

    Args:
      run_directory: of the policy's training.
      algorithm: what it was trained by.
      reference: what it started from.
      policy: as trained.
      prompts: of the demonstration.
    """
    answers = [demonstration.answers(prompt) for prompt in prompts]
    shape = (len(prompts), len(answers[0]))
    batch = answer_batch(policy, prompts, answers)
    log_prob = jax.jit(sequence_log_prob, static_argnums=0)
    policy_log_prob, reference_log_prob = (
        np.asarray(log_prob(policy.config, of.params, batch)).reshape(shape)
        for of in (policy, reference)
    )
    value: np.ndarray | None = None
    if algorithm.needs.value is not None:
        params = {"policy": policy.params, **restore_value(run_directory, algorithm, policy)}
        arrays = jax.jit(example_arrays, static_argnums=(0, 1))
        examples = arrays(policy.config, algorithm, params, reference.params, batch)
        # Of values a token, which differ from answer to answer, what the policy expects.
        probabilities = np.exp(renormalise(policy_log_prob))
        value = np.sum(probabilities * np.asarray(examples.value).reshape(shape), axis=1)
        if isinstance(algorithm, DroV) and algorithm.values == "single":
            value = np.full_like(value, value.mean())
    statistics = RewardStatistics.load_json(run_directory / STATISTICS)
    pairs = [
        [(prompt, answer) for answer in row] for prompt, row in zip(prompts, answers, strict=True)
    ]
    return AnswerScores(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        value=value,
        reward=np.array(
            [[statistics.normalise(demonstration.reward(*pair)) for pair in row] for row in pairs]
        ),
        score=np.array([[demonstration.order_score(*pair) for pair in row] for row in pairs]),
    )


def restore_value(
    run_directory: epath.Path, algorithm: Algorithm, policy: Policy
) -> dict[str, Any]:
    """{"value": parameters} of a run's value network; {} where V is read off the policy."""
    if algorithm.needs.value != "network":
        return {}
    directory, at = checkpoints.find(run_directory)
    abstract = layout_of(policy.config, has_value=True).abstract().value
    return {"value": checkpoints.restore_value(directory, at, abstract)}


def answer_batch(
    policy: Policy, prompts: list[str], answers: list[list[str]]
) -> dict[str, np.ndarray]:
    """Every answer [P, A] to every prompt as one batch of P * A rows."""
    rows = [
        (prompt, answer) for prompt, row in zip(prompts, answers, strict=True) for answer in row
    ]
    inputs = np.zeros((len(rows), policy.lengths["inputs"]), np.int32)
    targets = np.zeros((len(rows), policy.lengths["targets"]), np.int32)
    for i, (prompt, answer) in enumerate(rows):
        prompt_tokens = encode_prompt(policy.vocabulary, prompt, inputs.shape[1])
        answer_tokens = encode_completion(policy.vocabulary, answer, targets.shape[1])
        inputs[i, : len(prompt_tokens)] = prompt_tokens
        targets[i, : len(answer_tokens)] = answer_tokens
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
        "rewards": np.zeros((len(rows), 1), np.float32),
        "reward_weights": np.ones((len(rows), 1), np.float32),
    }


def sample_side_by_side(
    algorithm: str, reference: Policy, policy: Policy, prompts: list[str]
) -> list[dict[str, Any]]:
    """Samples both policies on every prompt and lets the true reward, without the rater's shift, judge.

    Returns:
      One row a comparison: prompt, the completions "sft" and algorithm, their scores, and "win" (1, 0, or
      0.5 for a tie).
    """
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    completions = []
    for name, of, seed in (("sft", reference, 1), (algorithm, policy, 2)):
        decoding = Decoding(max_tokens=of.lengths["targets"])
        texts = []
        with progress_bar(f"sampling {name}", len(repeated)) as progress:
            for completion in complete(
                of, repeated, decoding, seed=seed, batch_size=SAMPLING_BATCH_SIZE
            ):
                texts.append(completion.text)
                progress.advance(progress.task_ids[0])
        completions.append(texts)
    rows = []
    for prompt, sft, aligned in zip(repeated, *completions, strict=True):
        scores = [demonstration.order_score(prompt, text) for text in (sft, aligned)]
        rows.append(
            {
                "prompt": prompt,
                "sft": sft,
                algorithm: aligned,
                "sft_score": scores[0],
                f"{algorithm}_score": scores[1],
                "win": 0.5 + 0.5 * float(np.sign(scores[1] - scores[0])),
            }
        )
    return rows


def write_results(
    paths: Paths,
    algorithm: str,
    samples: list[dict[str, Any]],
    distance: Distance,
    seconds: float,
) -> dict[str, Any]:
    """Writes samples.jsonl and summary.json; returns what the latter holds."""
    by_prompt: dict[str, list[float]] = {}
    for row in samples:
        by_prompt.setdefault(row["prompt"], []).append(row["win"])
    # Samples of one prompt are not independent: the interval is over prompts.
    wins = np.array([np.mean(wins) for wins in by_prompt.values()])
    half_width = 1.96 * wins.std(ddof=1) / np.sqrt(len(wins))
    summary = {
        "algorithm": algorithm,
        "win_rate": float(wins.mean()),
        "win_rate_interval": [
            float(max(0.0, wins.mean() - half_width)),
            float(min(1.0, wins.mean() + half_width)),
        ],
        **dataclasses.asdict(distance),
        "held_out_prompts": len(wins),
        "seconds": seconds,
    }
    write_whole(paths.samples, "".join(json.dumps(row) + "\n" for row in samples))
    for place in (paths.summary, paths.aligned / SUMMARY):
        write_whole(place, json.dumps(summary, indent=2) + "\n")
    return summary


def compare(workdir: epath.Path) -> None:
    """Prints the summaries of all algorithms as one table, and writes it as Markdown."""
    summaries = [json.loads((workdir / name / SUMMARY).read_text()) for name in ALGORITHMS]
    columns = {
        "algorithm": lambda s: s["algorithm"],
        "win rate": lambda s: f"{s['win_rate']:.1%}",
        "KL from sft": lambda s: f"{s['kl_to_reference']:.3f}",
        "improvement": lambda s: f"{s['improvement_fraction']:.1%}",
        "KL to optimum": lambda s: f"{s['kl_to_optimum']:.4f}",
        "on the 24": lambda s: f"{s['policy_mass']:.3f}",
        "error of V": lambda s: "-" if s["value_error"] is None else f"{s['value_error']:.3f}",
        "seconds": lambda s: f"{s['seconds']:.0f}",
    }
    table = Table(title="all algorithms, one reference", title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=name == "algorithm")
    rows = [[cell(summary) for cell in columns.values()] for summary in summaries]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "against the optimum at tau = 1, whatever tau the method has. on the 24: the policy's probability of the "
        "24 answers, without which a low KL means little. seconds: of the call; the first also trained sft"
    )
    lines = [list(columns), ["---"] * len(columns), *rows]
    place = workdir / "algorithms.md"
    write_whole(place, "".join(f"| {' | '.join(line)} |\n" for line in lines))
    console.print(f"table        {place}")


def show(paths: Paths, samples: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints ten prompts with both answers, the numbers, and where everything lies."""
    table = Table(title="held-out prompts", title_justify="left")
    name = summary["algorithm"]
    for column in ("prompt", "sft", "pairs in order", name, "pairs in order"):
        table.add_column(column)
    shown = samples[:: SAMPLES_PER_PROMPT * max(1, summary["held_out_prompts"] // SHOWN_PROMPTS)]
    for row in shown[:SHOWN_PROMPTS]:
        table.add_row(
            row["prompt"],
            row["sft"],
            f"{row['sft_score']:.0f}",
            row[name],
            f"{row[f'{name}_score']:.0f}",
        )
    console.print(table)
    low, high = summary["win_rate_interval"]
    error = summary["value_error"]
    value_error = "this method has no V" if error is None else f"{error:.3f}"
    for line in (
        f"win rate of {name} over sft     {summary['win_rate']:.1%}  (95% interval {low:.1%} to {high:.1%})",
        f"win rate of the exact optimum  {summary['optimum_win_rate']:.1%}  (eq. 2: no policy does better "
        f"at this price for leaving the reference)",
        f"improvement reached            {summary['improvement_fraction']:.1%} of what is possible in "
        "J = E[r] - tau KL",
        f"KL to the optimum              {summary['kl_to_optimum']:.4f} nats",
        f"error of V                     {value_error}  (best constant: "
        f"{summary['constant_value_error']:.3f})",
        f"probability of the 24 answers  {summary['reference_mass']:.3f} under sft, "
        f"{summary['policy_mass']:.3f} under {name}",
        f"time                           {summary['seconds']:.0f} s",
        "",
        f"data         {paths.data}",
        f"checkpoints  {paths.sft}/checkpoint_*  {paths.aligned}/checkpoint_*",
        f"TensorBoard  tensorboard --logdir {paths.summary.parent}",
        f"samples      {paths.samples}",
        f"numbers      {paths.summary}",
    ):
        console.print(line)
