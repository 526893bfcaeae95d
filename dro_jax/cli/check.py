"""`dro_jax check`: what is in feedback files, before money is spent on them."""

import dataclasses
import json
from collections.abc import Sequence

from rich.table import Table

from dro_jax.cli.console import console
from dro_jax.data.inspection import Fill, Inspection, inspect
from dro_jax.data.ultrafeedback import Score
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import check_choice, check_number

_BAR = 40


def run(
    *,
    files: Sequence[str],
    vocabulary_file: str | None,
    inputs: int,
    targets: int,
    max_examples: int,
    ultrafeedback_score: Score,
    as_json: bool,
) -> None:
    """Inspects files; see `dro_jax check --help` for the arguments."""
    check_number("--inputs", inputs, whole=True, at_least=2)
    check_number("--targets", targets, whole=True, at_least=2)
    check_number("--max_examples", max_examples, whole=True, at_least=1)
    check_choice("--ultrafeedback_score", ultrafeedback_score, ("fine_grained", "overall"))
    inspection = inspect(
        files,
        vocabulary=load_vocabulary(vocabulary_file),
        lengths={"inputs": inputs, "targets": targets},
        max_examples=max_examples,
        ultrafeedback_score=ultrafeedback_score,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2))
    else:
        show(inspection)


def show(found: Inspection) -> None:
    """Prints an inspection for the terminal."""
    console.print(", ".join(found.files), style="bold")
    console.print(
        f"{found.rows} rows, {found.usable} usable; not usable: {found.bad} bad, {found.empty_prompts} with an "
        f"empty prompt, {found.empty_completions} with an empty completion, {found.unrated} that nobody rated"
    )
    for message in found.bad_messages:
        console.print(f"  {message}")
    if found.bad > len(found.bad_messages):
        console.print(f"  and {found.bad - len(found.bad_messages)} more")
    counts = ", ".join(f"{n} with {k}" for k, n in found.completions_per_prompt.items())
    console.print(f"{found.prompts} prompts, by number of completions: {counts}")
    console.print(
        f"{found.duplicates} rows repeat the prompt and completion of another, {found.contradictions} of them "
        "with another reward"
    )
    for line in found.duplicate_lines:
        console.print(f"  {line}")

    console.print()
    console.print(
        f"reward: mean {found.reward_mean:.4g}, standard deviation {found.reward_std:.4g}"
    )
    low, high = found.reward_quantiles["0"], found.reward_quantiles["1"]
    tallest = max(found.reward_histogram)
    for number, count in enumerate(found.reward_histogram):
        edge = low + (high - low) * number / len(found.reward_histogram)
        console.print(f"  from {edge:9.4g}  {'█' * round(_BAR * count / tallest):{_BAR}}  {count}")
    if found.reward_std == 0:
        console.print("  all rewards are equal: there is nothing to learn")

    table = Table(title="tokens, end of sequence included", title_justify="left")
    table.add_column("")
    for quantile in found.prompt_tokens:
        table.add_column({"0": "least", "0.5": "median", "1": "most"}.get(quantile, quantile))
    for name, tokens in (("prompt", found.prompt_tokens), ("completion", found.completion_tokens)):
        table.add_row(name, *(f"{number:.0f}" for number in tokens.values()))
    console.print(table)

    table = Table(title="how full packed rows are", title_justify="left")
    for name in (
        "inputs",
        "targets",
        "inputs cut",
        "targets cut",
        "one a row",
        "packed",
        "decoder",
        "examples a row",
    ):
        table.add_column(name)
    for fill in _worth_showing(found):
        table.add_row(*_cells(fill))
    table.add_section()
    table.add_row(*_cells(found.configured))
    table.add_section()
    table.add_row(*_cells(found.recommended), style="bold")
    console.print(table)
    console.print(
        "last rows: as asked for, with --inputs, --targets, --max_examples; and as recommended:"
    )
    best = found.recommended
    console.print(
        f"--gin.TASK_FEATURE_LENGTHS=\"{{'inputs':{best.inputs},'targets':{best.targets}}}\" "
        f"--gin.MAX_EXAMPLES={best.max_examples}"
    )


def _worth_showing(found: Inspection) -> list[Fill]:
    """For each length of completions, the prompts' length with the fullest rows that cuts hardly a prompt."""
    shown = []
    for targets in sorted({fill.targets for fill in found.fills}):
        fills = [fill for fill in found.fills if fill.targets == targets]
        least = min(fill.prompts_cut for fill in fills)
        gentle = [fill for fill in fills if fill.prompts_cut <= max(0.05, least)]
        shown.append(max(gentle, key=lambda fill: fill.all))
    return shown


def _cells(fill: Fill) -> list[str]:
    return [
        str(fill.inputs),
        str(fill.targets),
        f"{fill.prompts_cut:.1%}",
        f"{fill.completions_cut:.1%}",
        f"{fill.unpacked:.0%}",
        f"{fill.all:.0%}",
        f"{fill.decoder:.0%}",
        f"{fill.examples:.1f}",
    ]
