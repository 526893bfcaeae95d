"""`dro_jax compare`: policies side by side, judged on the same prompts, with a report."""

import collections
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.table import Table

import dro_jax
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.generate import (
    Completion,
    Policy,
    Sampling,
    complete,
    load_policy,
    model_of,
    read_prompts,
)
from dro_jax.cli.judging import load_judge
from dro_jax.cli.run_folder import REFERENCE, make_directory, write_whole
from dro_jax.data.packing import Example, packed_batches
from dro_jax.data.vocabulary import encode_prompt
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation import report as reports
from dro_jax.evaluation.charts import LOSSES
from dro_jax.evaluation.judges import Comparison, Judge, Verdict
from dro_jax.evaluation.llm_judge import LlmJudge
from dro_jax.evaluation.page import to_html
from dro_jax.evaluation.sampling import Decoding
from dro_jax.networks import T5Config
from dro_jax.networks.sharding import Rules, laid_over
from dro_jax.training import checkpoints, loop, partitioning
from dro_jax.training.step import sequence_log_prob

logger = logging.getLogger(__name__)

SAVE_SECONDS = 20.0
"""Sampling is kept this often, so that an interruption loses no more."""

ROWS, EXAMPLES_A_ROW = 32, 8
"""Of a batch of answers whose log-probabilities are computed, at the most."""

JUDGE_REPLIES = "judge_replies.sqlite"
"""Inside the output folder: what a language model said."""

CURVES = (*LOSSES, "loss/constant", "kl/log_ratio_mean", "side_by_side/win_rate")
"""Of what training logged, what the report draws."""

CURVE_POINTS = 2000
"""The most points a curve keeps."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint to sample from, before its weights are read.

    Attributes:
      path: as the person named it; what is there may be another checkpoint a moment later.
      directory: folder of the checkpoint.
      step: its step.
      meta: its facts.
      name: in the report.
    """

    path: str
    directory: epath.Path
    step: int
    meta: checkpoints.Meta
    name: str

    def checkpoint(self) -> str:
        """The folder of this checkpoint alone."""
        return str(checkpoints.path_of(self.directory, self.step))

    def weights(self) -> str:
        """What identifies its policy, equal to `checkpoints.weights_digest` of it."""
        return checkpoints.policy_digest(self.meta)


@dataclasses.dataclass(frozen=True)
class File:
    """Completions of another system, or of `dro_jax generate`."""

    path: str
    name: str
    answers: list[str]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A policy's answers to all prompts, in their order; the numbers are None where there is no reference.

    Attributes:
      texts: N of them.
      log_ratios: log pi(y|x) - log pi_ref(y|x), nats, [N].
      cut: answers that stopped at the limit of tokens.
    """

    texts: list[str]
    log_ratios: np.ndarray | None
    cut: int | None


def run(
    *,
    policies: Sequence[str],
    prompts: str,
    judge: str,
    output: str,
    reference: str | None,
    folds: int,
    fold_size: int,
    sampling: Sampling,
) -> reports.Report:
    """Compares policies; see `dro_jax compare --help` for the arguments.

    Returns:
      What it wrote into the output folder.

    Raises:
      UsageError: for anything wrong with files or settings, before anything is sampled or written.
    """
    # 1. Everything a person can have got wrong.
    if len(policies) < 2:
        raise UsageError(f"{policies[0]}: give two policies or more to compare")
    check_number("--folds", folds, whole=True, at_least=1)
    check_number("--fold_size", fold_size, whole=True, at_least=1)
    texts = read_prompts(prompts)
    named = dict(zip(policies, names_of(policies), strict=True))
    sources = [find(path, named[path], texts) for path in policies]
    runs = [source for source in sources if isinstance(source, Run)]
    base, no_reference = find_reference(reference, runs)
    directory = epath.Path(output)
    judge_cache = directory / JUDGE_REPLIES
    judging = load_judge(judge, cache=judge_cache)
    make_directory(directory / "completions")

    # 2. The answers. A policy's seed follows from its place, so that `compare A B` and `compare A B C` share them, and
    # no two policies are given the same luck.
    answers = {}
    for place, source in enumerate(sources):
        if isinstance(source, File):
            answers[source.name] = Answers(source.answers, None, None)
        else:
            own = dataclasses.replace(sampling, seed=(sampling.seed + place) % 2**31)
            answers[source.name] = sample(source, base, texts, own, directory / "completions")

    # 3. The verdicts.
    pairs = [(i, j) for i in range(len(sources)) for j in range(i + 1, len(sources))]
    verdicts = {}
    for i, j in pairs:
        first, second = sources[i].name, sources[j].name
        verdicts[i, j] = ask(
            judging,
            [
                Comparison(*row)
                for row in zip(texts, answers[first].texts, answers[second].texts, strict=True)
            ],
            f"judging {first} and {second}",
        )

    # 4. The report.
    decodings = [sampling.decoding(source.meta["lengths"]) for source in runs]
    setting = reports.Setting(
        judge=f"{judge} ({judging.endpoint.model})" if isinstance(judging, LlmJudge) else judge,
        prompts_file=prompts,
        sampling=describe(decodings, sampling.seed),
        samples_policy=all(draws_from_policy(decoding) for decoding in decodings),
        reference=None if base is None else base.path,
        no_reference=no_reference,
        seed=sampling.seed,
        folds=folds,
        fold_size=fold_size,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=dro_jax.__version__,
    )
    curves = read_curves(runs)
    made = reports.make_report(
        setting,
        texts,
        [
            reports.Policy(
                name=source.name,
                source=source.path,
                answers=answers[source.name].texts,
                log_ratios=answers[source.name].log_ratios,
                cut=answers[source.name].cut,
                is_reference=isinstance(source, Run)
                and base is not None
                and source.weights() == base.weights(),
                curves=curves.get(source.name, {}),
            )
            for source in sources
        ],
        verdicts,
    )
    write_whole(directory / "verdicts.jsonl", verdict_lines(made))
    write_whole(directory / "report.json", json.dumps(reports.to_json(made), indent=2) + "\n")
    write_whole(directory / "report.md", reports.to_markdown(made))
    write_whole(directory / "report.html", to_html(made))
    show(made, directory)
    return made


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names for the policies: the ends of their paths, as long as it takes to tell them apart.

    Raises:
      UsageError: if two paths are the same.
    """
    absolute = [epath.Path(path).resolve() for path in paths]
    for place, path in enumerate(absolute):
        if path in absolute[:place]:
            raise UsageError(f"{paths[place]}: is given twice; give different policies")
    # A step, "best" or "reference" alone does not say whose.
    own = re.compile(r"best|reference|checkpoint_\d+")
    kept = [2 if own.fullmatch(path.name) else 1 for path in absolute]
    while True:
        names = ["/".join(path.parts[-k:]) for path, k in zip(absolute, kept, strict=True)]
        if len(set(names)) == len(names):
            return names
        kept = [k + (names.count(name) > 1) for k, name in zip(kept, names, strict=True)]


def find(path: str, name: str, prompts: Sequence[str]) -> Run | File:
    """What a person named: a checkpoint, or a file of completions.

    Raises:
      UsageError: if it is neither, or the file does not have an answer to every prompt.
    """
    if path.endswith(".jsonl"):
        return File(path, name, read_completions(path, prompts))
    directory, step = checkpoints.find(path)
    return Run(path, directory, step, checkpoints.read_meta(directory, step), name)


def read_completions(path: str, prompts: Sequence[str]) -> list[str]:
    """A file's answer to each prompt; for a prompt that occurs k times, the k-th of its answers at the k-th place.

    Raises:
      UsageError: if the file cannot be read, a row is not a prompt and a completion, or an answer is missing.
    """
    try:
        lines = epath.Path(path).read_bytes().decode().removeprefix("\ufeff").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a UTF-8 file") from error
    found: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: no fields 'prompt' and 'completion'; write one JSON object a line"
            ) from error
        for text in (prompt, completion):
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                raise UsageError(f"{path}, line {number}: is not text; write strings")
        found[prompt].append(completion)
    answers = []
    for number, prompt in enumerate(prompts, 1):
        if not found[prompt]:
            raise UsageError(
                f"{path}: no completion of prompt {number} ({prompt[:60]!r}); give a row for every prompt"
            )
        answers.append(found[prompt].popleft())
    return answers


def find_reference(path: str | None, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The reference that was named, or else the one that the runs were aligned from.

    Returns:
      The reference and "", or None and why there is none.

    Raises:
      UsageError: if the one that was named is no checkpoint, or has another vocabulary than a run.
    """
    if path is not None:
        directory, step = checkpoints.find(path)
        reference = Run(path, directory, step, checkpoints.read_meta(directory, step), path)
        for run in runs:
            if run.meta["vocabulary"] != reference.meta["vocabulary"]:
                raise UsageError(
                    f"{path}: has another vocabulary than {run.path}, and no log-ratio to it; give another --reference"
                )
        return reference, ""
    if not runs:
        return None, "there are only completions, and no policies"
    digests = {run.meta.get("reference") for run in runs} - {None}
    if not digests:
        return None, "no run has a reference of its own, and no --reference is given"
    if len(digests) > 1 or len({run.meta["vocabulary"] for run in runs}) > 1:
        return (
            None,
            "the runs have different references or vocabularies, and no --reference is given",
        )
    for run in runs:
        # One checkpoint's reference lies beside it.
        place = run.directory / REFERENCE
        if run.meta.get("reference") and checkpoints.steps(place):
            step = checkpoints.steps(place)[-1]
            meta = checkpoints.read_meta(place, step)
            return Run(str(place), place, step, meta, str(place)), ""
    return None, "the runs' reference is not there any more, and no --reference is given"


def sample(
    source: Run, base: Run | None, prompts: list[str], sampling: Sampling, folder: epath.Path
) -> Answers:
    """A policy's answers: those that an earlier call left in the folder, and the rest sampled.

    The file's name holds a hash of all that its rows follow from, so that no other policy's, prompts', seed's or
    decoding's are taken for these.

    Args:
      source: the policy.
      base: the reference.
      prompts: texts.
      sampling: how, with the policy's own seed.
      folder: of the completions.

    Returns:
      An answer a prompt.
    """
    decoding = sampling.decoding(source.meta["lengths"])
    facts = {
        "weights": source.weights(),
        "lengths": source.meta["lengths"],
        "dtype": np.dtype(model_of(source.meta).compute_dtype).name,
        "reference": None if base is None else base.weights(),
        "decoding": dataclasses.asdict(decoding),
        "seed": sampling.seed,
        "prompts": prompts,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', source.name)}-{digest}.jsonl"
    rows = read_rows(path, prompts)
    if len(rows) < len(prompts):
        policy = load_policy(source.checkpoint(), sampling.partitioning())
        reference = None
        if base is not None and base.weights() != source.weights():
            reference = load_policy(base.checkpoint(), sampling.partitioning())
        sample_rest(policy, reference, prompts, rows, decoding, sampling, path, source.name)
    ratios = None
    if base is not None:
        ratios = np.array([row["log_ratio"] or 0.0 for row in rows])
    return Answers(
        [row["completion"] for row in rows], ratios, sum(not row["ended"] for row in rows)
    )


def read_rows(path: epath.Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """What a file of `sample_rest` holds, [] without one.

    Raises:
      UsageError: if it is not what was written.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1]):
        try:
            row = json.loads(line)
            whole = set(row) == {"prompt", "completion", "ended", "log_ratio"}
        except (ValueError, TypeError):
            whole = False
        if not whole or number >= len(prompts) or row["prompt"] != prompts[number]:
            raise UsageError(f"{path}, line {number + 1}: is not what was written; delete the file")
        rows.append(row)
    return rows


def sample_rest(
    policy: Policy,
    reference: Policy | None,
    prompts: list[str],
    rows: list[dict[str, Any]],
    decoding: Decoding,
    sampling: Sampling,
    path: epath.Path,
    name: str,
) -> None:
    """Samples the prompts that have no row yet, adding to `rows` and keeping them in a file as it goes."""
    done = len(rows)
    completions = complete(
        policy,
        prompts[done:],
        decoding,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        first=done,
    )
    saved = time.monotonic()
    try:
        with progress_bar(f"sampling {name}", len(prompts), done) as progress:
            some: list[Completion] = []
            for completion in completions:
                some.append(completion)
                if len(some) < sampling.batch_size and done + len(some) < len(prompts):
                    continue
                texts = prompts[done : done + len(some)]
                ratios: Sequence[float | None] = [None] * len(some)
                if reference is not None:
                    ratios = log_ratios(policy, reference, texts, some, decoding.max_tokens)
                rows += [
                    {
                        "prompt": prompt,
                        "completion": completion.text,
                        "ended": bool(completion.tokens[-1] == policy.vocabulary.eos_id),
                        "log_ratio": ratio,
                    }
                    for prompt, completion, ratio in zip(texts, some, ratios, strict=True)
                ]
                done, some = done + len(some), []
                progress.update(progress.task_ids[0], completed=done)
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_rows(path, rows)
                    saved = time.monotonic()
    finally:
        if rows:
            write_rows(path, rows)


def write_rows(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of completions, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log_ratios(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    max_tokens: int,
) -> list[float]:
    """log pi(y|x) - log pi_ref(y|x) of completions, the sum over the tokens that were drawn, nats.

    A completion that was cut has no end of sequence among them.
    """
    limits = {"inputs": policy.lengths["inputs"], "targets": max_tokens}
    examples: list[Example] = [
        {
            "inputs": np.array(encode_prompt(policy.vocabulary, prompt, limits["inputs"])),
            "targets": completion.tokens,
            "rewards": np.zeros(1, np.float32),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    shards = policy.mesh.size
    ratios = np.zeros(len(examples), np.float64)
    batches = packed_batches(
        examples,
        lengths=limits,
        max_examples=EXAMPLES_A_ROW,
        batch_size=-(-min(ROWS, len(examples)) // shards) * shards,
    )
    for batch, rows in batches:
        of_policy, of_reference = (
            np.asarray(log_prob(which, batch), np.float64) for which in (policy, reference)
        )
        for row, numbers in enumerate(rows):
            ratios[numbers] = (of_policy - of_reference)[row, : len(numbers)]
    return ratios.tolist()


@functools.lru_cache(maxsize=4)
def make_log_prob(config: T5Config, mesh: Mesh, rules: Rules) -> Callable[..., jax.Array]:
    """Builds the jitted `log_prob(params, batch)`, float32 [B, N]; the same function for the same arguments."""

    def log_prob_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        with laid_over(mesh, rules):
            return sequence_log_prob(config, params, batch)

    return jax.jit(log_prob_of, out_shardings=partitioning.replicated(mesh))


def log_prob(policy: Policy, batch: dict[str, np.ndarray]) -> jax.Array:
    """log pi(y|x) of a batch's examples, float32 [B, N]."""
    sharding = partitioning.batch_sharding(policy.mesh, policy.rules)
    return make_log_prob(policy.config, policy.mesh, policy.rules)(
        policy.params, loop.to_devices(batch, sharding)
    )


def ask(judge: Judge, comparisons: Sequence[Comparison], description: str) -> list[Verdict]:
    """The judge's verdicts, one a comparison, with a bar."""
    verdicts = []
    with progress_bar(description, len(comparisons)) as progress:
        for verdict in judge(comparisons):
            verdicts.append(verdict)
            progress.update(progress.task_ids[0], completed=len(verdicts))
    return verdicts


def draws_from_policy(decoding: Decoding) -> bool:
    """Whether completions are samples of the policy itself."""
    return (
        decoding.temperature == 1
        and decoding.top_k == 0
        and decoding.top_p == 1
        and decoding.num_beams == 1
    )


def describe(decodings: Sequence[Decoding], seed: int) -> str:
    """How answers were drawn, in words."""
    if not decodings:
        return "as in the files"
    one = decodings[0]
    if one.num_beams > 1:
        how = [f"by a search of {one.num_beams} beams, length penalty {one.length_penalty:g}"]
    elif one.temperature == 0:
        how = ["greedy"]
    else:
        how = [f"sampled at temperature {one.temperature:g}"]
        how += [f"top-k {one.top_k}"] if one.top_k else []
        how += [f"top-p {one.top_p:g}"] if one.top_p < 1 else []
    limits = " or ".join(map(str, sorted({decoding.max_tokens for decoding in decodings})))
    return ", ".join([*how, f"at most {limits} tokens", f"seeds from {seed}"])


def read_curves(runs: Sequence[Run]) -> dict[str, dict[str, reports.Curve]]:
    """What the training of each run logged, by the run's name; a run of several checkpoints counts once."""
    # It imports TensorFlow.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, dict[str, reports.Curve]] = {}
    seen: set[epath.Path] = set()
    for run in runs:
        if run.directory in seen:
            continue
        seen.add(run.directory)
        curves[run.name] = {}
        for folder, title in (("train", "train"), ("training_eval", "held out")):
            logs = run.directory / folder
            if not logs.exists():
                continue
            events = EventAccumulator(str(logs), size_guidance={"tensors": CURVE_POINTS})
            events.Reload()
            for tag in sorted(set(events.Tags()["tensors"]) & set(CURVES)):
                curves[run.name][f"{title} {tag}"] = curve_of(events.Tensors(tag))
    return curves


def curve_of(events: Sequence[Any]) -> reports.Curve:
    """A curve of TensorBoard's events; what a run that was resumed logged again counts once."""
    from tensorboard.util import tensor_util

    values = {
        event.step: float(tensor_util.make_ndarray(event.tensor_proto))
        for event in sorted(events, key=lambda event: event.wall_time)
    }
    finite = sorted((step, value) for step, value in values.items() if np.isfinite(value))
    return reports.Curve([step for step, _ in finite], [value for _, value in finite])


def verdict_lines(report: reports.Report) -> str:
    """Every verdict as JSONL."""
    names = report.names()
    lines = []
    for (i, j), verdicts in report.verdicts.items():
        winners = {"A": names[i], "B": names[j], "tie": "tie", None: None}
        for prompt, verdict in zip(report.prompts, verdicts, strict=True):
            row = {
                "prompt": prompt,
                "first": names[i],
                "second": names[j],
                "winner": winners[verdict.winner],
                "flipped": verdict.flipped,
                "reason": verdict.reason,
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def show(report: reports.Report, directory: epath.Path) -> None:
    """Prints the numbers, and where everything lies."""
    console.print(reports.headline(report), style="bold")
    pairs = Table(title=f"{len(report.prompts)} prompts", title_justify="left")
    columns = ("pair", "win rate", "95% interval", "folds", "p")
    kept = [reports.PAIR_COLUMNS.index(name) for name in columns]
    for column in columns:
        pairs.add_column(column, justify="left" if column == "pair" else "right", no_wrap=True)
    for row in reports.pair_rows(report):
        pairs.add_row(*(row[k] for k in kept))
    console.print(pairs)
    policies = Table()
    for column in ("policy", "mean length", reports.log_ratio_name(report.setting)):
        policies.add_column(column, justify="left" if column == "policy" else "right")
    for name, _, length, *_, ratio in reports.policy_rows(report):
        policies.add_row(name, length, ratio)
    console.print(policies)
    console.print(f"page     {directory / 'report.html'}")
    console.print(f"numbers  {directory / 'report.json'}  {directory / 'report.md'}")
