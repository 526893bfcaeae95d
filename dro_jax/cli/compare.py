"""`dro_jax compare`: policies side by side, judged on the same prompts, with a report."""

import dataclasses
import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.table import Table

import dro_jax
from dro_jax.cli.answers import Answers, File, Run, find, find_reference, sample
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.generate import Sampling, read_prompts
from dro_jax.cli.judging import load_judge
from dro_jax.cli.run_folder import make_directory
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation import report as reports
from dro_jax.evaluation.charts import LOSSES
from dro_jax.evaluation.judges import Comparison, Judge, Verdict
from dro_jax.evaluation.llm_judge import LlmJudge
from dro_jax.evaluation.page import to_html
from dro_jax.evaluation.sampling import Decoding
from dro_jax.whole_files import write_whole

JUDGE_REPLIES = "judge_replies.sqlite"
"""Inside the output folder: what a language model said."""

CURVES = (*LOSSES, "loss/constant", "kl/log_ratio_mean", "side_by_side/win_rate")
"""Of what training logged, what the report draws."""

CURVE_POINTS = 2000
"""The most points a curve keeps."""


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
