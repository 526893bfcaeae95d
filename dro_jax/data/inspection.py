"""What a person wants to know about feedback files before spending money on them."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import seqio

from dro_jax.data.feedback import UnusableRow, prompt_id, read_rows
from dro_jax.data.packing import WINDOW, pack
from dro_jax.data.records import paths
from dro_jax.data.ultrafeedback import Score
from dro_jax.errors import UsageError

INPUT_LENGTHS = (64, 128, 256, 512, 1024)
TARGET_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
MOST_EXAMPLES = (4, 8, 16, 32, 64)
"""What rows are tried with."""

GOOD_FILL = 0.85
MOST_CUT = {"inputs": 0.01, "targets": 0.05}
_SAMPLE = 2 * WINDOW
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_MESSAGES_KEPT = 20
_EXAMPLES_KEPT = 5


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full rows are at some lengths, and what is cut there.

    Attributes:
        inputs: tokens a row holds of the prompts.
        targets: tokens it holds of the completions.
        max_examples: the most examples in a row.
        all: share of all positions that hold a token.
        decoder: share of the decoder's positions.
        unpacked: share of all positions with one example a row.
        examples: mean number of examples a row.
        prompts_cut: share of prompts over the limit.
        completions_cut: share of completions.
    """

    inputs: int
    targets: int
    max_examples: int
    all: float
    decoder: float
    unpacked: float
    examples: float
    prompts_cut: float
    completions_cut: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found, JSON-ready by `dataclasses.asdict`.

    `bad` and `duplicates` are counts, with the first few as messages and as (line, line of the first);
    `quantiles` are by share of rows; `reward_histogram` has ten bins between the least and the greatest.
    """

    files: tuple[str, ...]
    rows: int
    usable: int
    bad: int
    bad_messages: tuple[str, ...]
    empty_prompts: int
    empty_completions: int
    unrated: int
    prompts: int
    completions_per_prompt: dict[int, int]
    duplicates: int
    duplicate_lines: tuple[str, ...]
    contradictions: int
    reward_mean: float
    reward_std: float
    reward_quantiles: dict[str, float]
    reward_histogram: tuple[int, ...]
    prompt_tokens: dict[str, float]
    completion_tokens: dict[str, float]
    configured: Fill
    fills: tuple[Fill, ...]
    recommended: Fill


def inspect(
    patterns: Sequence[str],
    *,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    max_examples: int,
    ultrafeedback_score: Score = "fine_grained",
) -> Inspection:
    """Reads every row once; bad rows are counted, whatever their number.

    Args:
        patterns: files, globs, or TFDS datasets.
        vocabulary: of prompts and completions.
        lengths: the limits that are planned, of "inputs" and "targets".
        max_examples: the most examples a row that are planned.
        ultrafeedback_score: as of `FeedbackFile`.

    Raises:
        UsageError: a file cannot be read, or no row is usable.
    """
    unusable: collections.Counter[str] = collections.Counter()
    messages: list[str] = []
    first_seen: dict[int, tuple[str, float]] = {}
    duplicates = contradictions = 0
    repeated: list[str] = []
    per_prompt: collections.Counter[int] = collections.Counter()
    rewards: list[float] = []
    sizes: list[list[int]] = []
    # Of two files of a pattern, each has a line 1.
    for path in itertools.chain.from_iterable(map(paths, patterns)):
        for row in read_rows(path, ultrafeedback_score):
            if isinstance(row, UnusableRow):
                unusable[row.kind] += 1
                if row.kind == "bad" and len(messages) < _MESSAGES_KEPT:
                    messages.append(row.message)
                continue
            where = f"{path}, line {row.line}"
            per_prompt[prompt_id(row.prompt)] += 1
            pair = hash((row.prompt, row.completion))
            if before := first_seen.get(pair):
                duplicates += 1
                contradictions += before[1] != row.reward
                if len(repeated) < _EXAMPLES_KEPT:
                    repeated.append(f"{where} repeats {before[0]}")
            else:
                first_seen[pair] = where, row.reward
            rewards.append(row.reward)
            # With the end of sequence.
            sizes.append(
                [len(vocabulary.encode(text)) + 1 for text in (row.prompt, row.completion)]
            )
    if not rewards:
        raise UsageError(
            f"{', '.join(patterns)}: no row is usable"
            + (f"; the first: {messages[0]}" if messages else "")
        )
    reward, tokens = np.array(rewards), np.array(sizes)
    # The first rows may be of one kind: the sample is of the whole.
    order = np.random.default_rng(0).permutation(len(tokens))[:_SAMPLE]
    sample = tokens[order]
    fills = tuple(
        fill(tokens, sample, inputs, targets, MOST_EXAMPLES[-1])
        for inputs, targets in itertools.product(INPUT_LENGTHS, TARGET_LENGTHS)
    )
    return Inspection(
        files=tuple(patterns),
        rows=len(rewards) + sum(unusable.values()),
        usable=len(rewards),
        bad=unusable["bad"],
        bad_messages=tuple(messages),
        empty_prompts=unusable["empty prompt"],
        empty_completions=unusable["empty completion"],
        unrated=unusable["unrated"],
        prompts=len(per_prompt),
        completions_per_prompt=dict(sorted(collections.Counter(per_prompt.values()).items())),
        duplicates=duplicates,
        duplicate_lines=tuple(repeated),
        contradictions=contradictions,
        reward_mean=float(reward.mean()),
        # Exactly 0 for equal rewards.
        reward_std=float((reward - reward[0]).std()),
        reward_quantiles=_quantiles(reward),
        reward_histogram=_histogram(reward),
        prompt_tokens=_quantiles(tokens[:, 0]),
        completion_tokens=_quantiles(tokens[:, 1]),
        configured=fill(tokens, sample, lengths["inputs"], lengths["targets"], max_examples),
        fills=fills,
        recommended=recommend(tokens, sample, fills),
    )


def fill(
    tokens: np.ndarray, sample: np.ndarray, inputs: int, targets: int, max_examples: int
) -> Fill:
    """Packs a sample of examples as training would, a window at a time.

    Args:
        tokens: int [rows, 2], tokens of prompt and completion.
        sample: those to pack.
        inputs: tokens a row holds of the prompts.
        targets: tokens it holds of the completions.
        max_examples: the most examples in a row.
    """
    limits = np.array([inputs, targets])
    cut = np.minimum(sample, limits)
    rows = sum(
        len(pack(cut[start : start + WINDOW], limits.tolist(), max_examples))
        for start in range(0, len(cut), WINDOW)
    )
    too_long = (tokens > limits).mean(axis=0)
    return Fill(
        inputs=inputs,
        targets=targets,
        max_examples=max_examples,
        all=float(cut.sum() / (rows * limits.sum())),
        decoder=float(cut[:, 1].sum() / (rows * targets)),
        unpacked=float(cut.sum() / (len(cut) * limits.sum())),
        examples=len(cut) / rows,
        prompts_cut=float(too_long[0]),
        completions_cut=float(too_long[1]),
    )


def recommend(tokens: np.ndarray, sample: np.ndarray, fills: Sequence[Fill]) -> Fill:
    """Returns the smallest rows that cut little and are well filled, with as few slots as that takes.

    Little is a hundredth of the prompts and a twentieth of the completions, or the least that any of
    the lengths tried cuts; well is 85% of all positions, or the most that is reached.
    """
    least = {
        "inputs": max(MOST_CUT["inputs"], min(f.prompts_cut for f in fills)),
        "targets": max(MOST_CUT["targets"], min(f.completions_cut for f in fills)),
    }
    gentle = [
        f
        for f in fills
        if f.prompts_cut <= least["inputs"] and f.completions_cut <= least["targets"]
    ]
    full = [f for f in gentle if f.all >= GOOD_FILL] or [max(gentle, key=lambda f: f.all)]
    best = min(full, key=lambda f: f.inputs + f.targets)
    for slots in MOST_EXAMPLES:
        fewer = fill(tokens, sample, best.inputs, best.targets, slots)
        if fewer.all >= min(GOOD_FILL, 0.99 * best.all):
            return fewer
    return best


def _histogram(numbers: np.ndarray) -> tuple[int, ...]:
    # NumPy's refuses numbers that differ by a rounding error.
    low, high = numbers.min(), numbers.max()
    bins = (10 * ((numbers - low) / ((high - low) or 1))).astype(int)
    return tuple(np.bincount(np.minimum(bins, 9), minlength=10).tolist())


def _quantiles(numbers: np.ndarray) -> dict[str, float]:
    return {f"{q:g}": float(np.quantile(numbers, q)) for q in _QUANTILES}
