"""Feedback files: judging, splitting and summarising (prompt, completion, reward) rows.

Files are JSONL, plain or gzip (`.gz`), in UTF-8, one JSON object a line, or Parquet (`.parquet`), or a prepared
TFDS dataset ("tfds:name"); a glob stands for several. Rows are triplets,

    {"prompt": "Name a colour.", "completion": "Red.", "reward": 0.5}
    {"prompt": "Name a colour.", "response": "Seven.", "label": "down"}

or UltraFeedback's records of a prompt with its rated completions, which become triplets. `prompt` and
`completion` (or `response`) are text, or a conversation: a list of {"role", "content"}, whose contents are
joined. `reward` (or `score`) is a finite number, or `label` is a thumb: true/false, 1/0, "up"/"down" (also
"thumbs up"), "👍"/"👎". Other fields are ignored, and so are blank lines.
"""

import array
import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

from etils import epath

from dro_jax.data import ultrafeedback
from dro_jax.data.records import LARGEST_FLOAT32, read_records, shown
from dro_jax.errors import UsageError, check_choice
from dro_jax.whole_files import write_whole

Split = Literal["train", "validation"]

FIELDS = (
    "prompt",
    "completion",
    "response",
    "reward",
    "score",
    "label",
    "instruction",
    "completions",
)
"""All that is read of a row, and of a record of UltraFeedback's."""

_BAD_ROW_MESSAGES_KEPT = 5
_LABEL_REWARDS: dict[Any, float] = {
    # True == 1 and 1.0 == 1 as keys, so these two lines serve booleans, integers and floats.
    1: 1.0,
    0: 0.0,
    "up": 1.0,
    "down": 0.0,
    "👍": 1.0,
    "👎": 0.0,
}


@dataclasses.dataclass(frozen=True)
class FeedbackFile:
    """A feedback file, or several, and how its rows are judged and split.

    Attributes:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file, local or remote (gs://), a glob of them, or
            "tfds:name".
        validation_fraction: the share of prompts held out, in [0, 1).
        skip_bad_rows: count and skip bad rows instead of refusing the file at the first one.
        max_unusable_fraction: the most that bad and empty rows may make up of all rows, in [0, 1].
        top_fraction: the share of the training rows, those of highest reward, to train on, in (0, 1]; rows
            as good as the last of them are kept too.
        ultrafeedback_score: what UltraFeedback's completions are rewarded by: "fine_grained", the mean of the
            aspects' ratings, or "overall", which is wrong in some rows of the first release.

    Raises:
        UsageError: a fraction is out of its range.
    """

    path: str
    validation_fraction: float = 0.1
    skip_bad_rows: bool = False
    max_unusable_fraction: float = 0.05
    top_fraction: float = 1.0
    ultrafeedback_score: ultrafeedback.Score = "fine_grained"

    def __post_init__(self) -> None:
        """Refuses a path that is no text, and fractions that are out of range."""
        if not isinstance(self.path, str):
            raise UsageError(f"FEEDBACK_FILE is {self.path!r}; give a path, as in \"'my.jsonl'\"")
        held_out, unusable = self.validation_fraction, self.max_unusable_fraction
        if not (isinstance(held_out, int | float) and 0 <= held_out < 1):
            raise UsageError(f"validation_fraction is {held_out!r}; set it in [0, 1)")
        if not (isinstance(unusable, int | float) and 0 <= unusable <= 1):
            raise UsageError(f"max_unusable_fraction is {unusable!r}; set it in [0, 1]")
        if not (isinstance(self.top_fraction, int | float) and 0 < self.top_fraction <= 1):
            raise UsageError(f"top_fraction is {self.top_fraction!r}; set it in (0, 1]")
        check_choice("ultrafeedback_score", self.ultrafeedback_score, ("fine_grained", "overall"))


@dataclasses.dataclass(frozen=True)
class Triplet:
    """One usable row: a prompt, a completion, its raw reward, and the line it stands on."""

    prompt: str
    completion: str
    reward: float
    line: int


@dataclasses.dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be trained on, and one line that names file, line, field and remedy."""

    kind: Literal["bad", "empty prompt", "empty completion", "unrated"]
    message: str
    line: int


@dataclasses.dataclass(frozen=True)
class RewardStatistics:
    """Mean and population standard deviation of the raw rewards of a training split."""

    mean: float
    std: float

    def normalise(self, reward: float) -> float:
        """Returns (reward - mean) / std."""
        return (reward - self.mean) / self.std

    def save_json(self, path: epath.PathLike) -> None:
        """Writes the statistics to `path`; floats survive the round trip exactly."""
        write_whole(path, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load_json(cls, path: epath.PathLike) -> "RewardStatistics":
        """Reads what `save_json` wrote.

        Raises:
            UsageError: the file is missing or does not hold reward statistics.
        """
        try:
            fields = json.loads(epath.Path(path).read_text())
            statistics = cls(mean=float(fields["mean"]), std=float(fields["std"]))
        except OSError as error:
            raise UsageError(
                f"{path}: the reward statistics cannot be read ({error.strerror or error}); "
                "restore the file that training saved with the model"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}: holds no reward statistics; restore the file that training saved "
                "with the model"
            ) from error
        if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
            raise UsageError(
                f"{path}: mean {statistics.mean} and std {statistics.std} cannot normalise "
                "rewards; restore the file that training saved with the model"
            )
        return statistics


@dataclasses.dataclass(frozen=True)
class FeedbackSummary:
    """What one pass over a feedback file found.

    `rows` counts every row that is not blank: bad, empty and usable. The usable ones are
    `train_rows` + `validation_rows`. `min_reward` and `max_reward` are over all usable rows,
    `rewards` over the training split alone, before `top_fraction` leaves `top_rows` of it: those with a
    reward of at least `top_reward`. `train_pairs` counts disjoint pairs of rows of one prompt,
    `contrasting_prompts` the training prompts with two different rewards. `digest` identifies the usable
    rows and their order.
    """

    path: str
    rows: int
    bad_rows: int
    bad_row_messages: tuple[str, ...]
    empty_prompts: int
    empty_completions: int
    unrated: int
    train_rows: int
    train_prompts: int
    train_pairs: int
    contrasting_prompts: int
    top_rows: int
    top_reward: float
    validation_rows: int
    validation_prompts: int
    rewards: RewardStatistics
    min_reward: float
    max_reward: float
    digest: str

    @property
    def num_input_examples(self) -> dict[str, int]:
        """Rows to be used of each split, as SeqIO names them."""
        return {"train": self.top_rows, "validation": self.validation_rows}

    def describe(self) -> str:
        """Returns the summary as a few lines for the log."""
        lines = [
            f"{self.path}: {self.rows} rows, {self.train_rows} for training "
            f"({self.train_prompts} prompts), {self.validation_rows} for validation "
            f"({self.validation_prompts} prompts)",
            f"skipped: {self.bad_rows} bad, {self.empty_prompts} with an empty prompt, "
            f"{self.empty_completions} with an empty completion"
            + (f", {self.unrated} that nobody rated" if self.unrated else ""),
            f"raw reward: mean {self.rewards.mean:.6g}, standard deviation {self.rewards.std:.6g} "
            f"(training split); from {self.min_reward:.6g} to {self.max_reward:.6g}",
            *self.bad_row_messages,
        ]
        if self.top_rows < self.train_rows:
            lines.append(
                f"trained on: the {self.top_rows} rows with a reward of at least {self.top_reward:.6g}"
            )
        if not self.validation_rows:
            lines.append("the validation split is empty: nothing will be evaluated")
        return "\n".join(lines)


def split_of(prompt: str, validation_fraction: float) -> Split:
    """Returns the split that a prompt belongs to, whatever else the file holds.

    The prompt's hash, read as a number in [0, 1), is compared with `validation_fraction`: all rows of
    a prompt fall on one side, and stay there when the file grows.
    """
    position = prompt_id(prompt) / 2**64
    return "validation" if position < validation_fraction else "train"


def prompt_id(prompt: str) -> int:
    """Returns a prompt's hash, in [0, 2^64)."""
    return int.from_bytes(_prompt_digest(prompt), "big")


def read_rows(
    path: str, ultrafeedback_score: ultrafeedback.Score = "fine_grained"
) -> Iterator[Triplet | UnusableRow]:
    """Yields every row that is not blank, judged, in file order and in constant memory.

    Raises:
        UsageError: as `records.read_records`.
    """
    for record in read_records(path):
        if record.problem:
            yield UnusableRow("bad", f"{record.where}: {record.problem}", record.line)
        elif ultrafeedback.is_record(record.fields):
            rows = ultrafeedback.flatten(record.fields, ultrafeedback_score)
            for number, fields in enumerate(rows, 1):
                where = f"{record.where}, completion {number}"
                if fields["reward"] is None:
                    yield UnusableRow("unrated", f"{where}: nobody rated it", record.line)
                else:
                    yield _judge(fields, where, record.line)
        else:
            yield _judge(record.fields, record.where, record.line)


def _judge(fields: dict[str, Any], where: str, line: int) -> Triplet | UnusableRow:
    try:
        prompt = _text(fields, "prompt")
        completion = _text(fields, "completion", "response")
        reward = _reward(fields)
    except _BadRow as problem:
        return UnusableRow("bad", f"{where}: {problem}", line)
    if not prompt.strip():
        return UnusableRow("empty prompt", f"{where}: field 'prompt' is empty", line)
    if not completion.strip():
        return UnusableRow("empty completion", f"{where}: field 'completion' is empty", line)
    return Triplet(prompt, completion, reward, line)


def read_feedback(file: FeedbackFile, split: Split | None = None) -> Iterator[Triplet]:
    """Yields the usable rows of one split (None: of both), in file order and in constant memory.

    Rows with an empty prompt or completion are passed over.

    Raises:
        UsageError: as `read_rows`; or a bad row, unless `file.skip_bad_rows`.
    """
    for row in read_rows(file.path, file.ultrafeedback_score):
        if isinstance(row, UnusableRow):
            _refuse_bad_row(row, file)
        elif split is None or split_of(row.prompt, file.validation_fraction) == split:
            yield row


def summarise(file: FeedbackFile) -> FeedbackSummary:
    """Returns counts and reward statistics from one pass over a feedback file.

    Memory is constant but for a few bytes a distinct prompt, and a reward where `top_fraction` is below 1.

    Raises:
        UsageError: as `read_feedback`; or the file has no rows, too many unusable rows, an empty
            training split, or rewards that cannot be normalised.
    """
    unusable = {"bad": 0, "empty prompt": 0, "empty completion": 0, "unrated": 0}
    bad_row_messages: list[str] = []
    first_unusable = ""
    rows = {"train": 0, "validation": 0}
    prompts: dict[str, collections.Counter[bytes]] = {
        "train": collections.Counter(),
        "validation": collections.Counter(),
    }
    train_rewards = array.array("d")
    rewards_of: dict[bytes, float | None] = {}
    rows_digest = hashlib.sha256()
    mean, squares = 0.0, 0.0
    low, high = math.inf, -math.inf
    for row in read_rows(file.path, file.ultrafeedback_score):
        if isinstance(row, UnusableRow):
            _refuse_bad_row(row, file)
            unusable[row.kind] += 1
            first_unusable = first_unusable or row.message
            if row.kind == "bad" and len(bad_row_messages) < _BAD_ROW_MESSAGES_KEPT:
                bad_row_messages.append(row.message)
            continue
        split = split_of(row.prompt, file.validation_fraction)
        rows[split] += 1
        prompt = _prompt_digest(row.prompt)
        prompts[split][prompt] += 1
        for part in (row.prompt, row.completion, repr(row.reward)):
            rows_digest.update(f"{len(part)}:{part}".encode())
        low, high = min(low, row.reward), max(high, row.reward)
        if split == "train":
            # Welford's recurrence: exact zero for equal rewards, and no cancellation.
            deviation = row.reward - mean
            mean += deviation / rows["train"]
            squares += deviation * (row.reward - mean)
            if file.top_fraction < 1:
                train_rewards.append(row.reward)
            if rewards_of.setdefault(prompt, row.reward) != row.reward:
                rewards_of[prompt] = None  # More than one.

    skipped = sum(unusable.values())
    total = skipped + rows["train"] + rows["validation"]
    if not total:
        raise UsageError(f"{file.path}: the file has no rows; write one JSON object a line")
    if skipped > file.max_unusable_fraction * total:
        raise UsageError(
            f"{file.path}: {skipped} of {total} rows are unusable ({unusable['bad']} bad, "
            f"{unusable['empty prompt']} with an empty prompt, {unusable['empty completion']} with "
            f"an empty completion, {unusable['unrated']} that nobody rated), more than "
            f"max_unusable_fraction = {file.max_unusable_fraction} allows; correct "
            f"the file or raise max_unusable_fraction; the first: {first_unusable}"
        )
    if not rows["train"]:
        raise UsageError(
            f"{file.path}: the training split is empty ({rows['validation']} usable rows, all held "
            "out for validation); add prompts or set validation_fraction = 0"
        )
    statistics = RewardStatistics(mean, math.sqrt(squares / rows["train"]))
    _check_normalisable(file.path, statistics, rows["train"], low, high)
    top_rows, top_reward = rows["train"], -math.inf
    if file.top_fraction < 1:
        descending = sorted(train_rewards, reverse=True)
        # 0.07 * 100 is a little more than 7.
        count = math.ceil(file.top_fraction * len(descending) - 1e-6)
        top_reward = descending[max(count, 1) - 1]
        top_rows = sum(reward >= top_reward for reward in descending)
    return FeedbackSummary(
        path=file.path,
        rows=total,
        bad_rows=unusable["bad"],
        bad_row_messages=tuple(bad_row_messages),
        empty_prompts=unusable["empty prompt"],
        empty_completions=unusable["empty completion"],
        unrated=unusable["unrated"],
        train_rows=rows["train"],
        train_prompts=len(prompts["train"]),
        train_pairs=sum(count // 2 for count in prompts["train"].values()),
        contrasting_prompts=sum(reward is None for reward in rewards_of.values()),
        top_rows=top_rows,
        top_reward=top_reward,
        validation_rows=rows["validation"],
        validation_prompts=len(prompts["validation"]),
        rewards=statistics,
        min_reward=low,
        max_reward=high,
        digest=rows_digest.hexdigest(),
    )


class _BadRow(Exception):
    """What is wrong with a row and how to put it right, without file and line."""


def _text(fields: dict[str, Any], *names: str) -> str:
    name, value = _only(fields, *names)
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        value = "\n\n".join(message["content"] for message in value)
    if not isinstance(value, str):
        raise _BadRow(f"field '{name}' is {shown(value)}, not text; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(
            f"field '{name}' holds half a surrogate pair, which is no character; remove it"
        ) from error
    return value


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("content"), str)


def _reward(fields: dict[str, Any]) -> float:
    name, value = _only(fields, "reward", "label", "score")
    if name == "label":
        label = value
        if isinstance(value, str):
            # "thumbs_up" is "up"; an emoji may carry a variation selector.
            label = value.strip().lower().removeprefix("thumbs").strip(" _-\ufe0f")
        try:
            return _LABEL_REWARDS[label]
        except (KeyError, TypeError) as error:
            raise _BadRow(
                f'field \'label\' is {shown(value)}; write true or false (or 1/0, "up"/"down"), '
                "or a number in field 'reward'"
            ) from error
    if isinstance(value, bool):
        raise _BadRow(f"field '{name}' is {shown(value)}, not a number; write it in field 'label'")
    if not isinstance(value, int | float):
        raise _BadRow(f"field '{name}' is {shown(value)}, not a number; write a finite number")
    # Comparing before float() keeps integers of any size from overflowing; NaN fails it too.
    if not abs(value) <= LARGEST_FLOAT32:
        raise _BadRow(
            f"field '{name}' is {shown(value)}, not a finite number of 32 bits; write a finite number"
        )
    return float(value)


def _only(fields: dict[str, Any], *names: str) -> tuple[str, Any]:
    """Returns the name and value of the one field given under `names`; null is not given."""
    given = [name for name in names if fields.get(name) is not None]
    if len(given) > 1:
        raise _BadRow(f"fields '{given[0]}' and '{given[1]}' are both given; keep one of them")
    if not given:
        state = "null" if any(name in fields for name in names) else "missing"
        others = ", ".join(f"'{name}'" for name in names[1:])
        alternatives = f" (or {others})" if others else ""
        raise _BadRow(f"field '{names[0]}'{alternatives} is {state}; give every row one")
    return given[0], fields[given[0]]


def _refuse_bad_row(row: UnusableRow, file: FeedbackFile) -> None:
    if row.kind == "bad" and not file.skip_bad_rows:
        raise UsageError(f"{row.message}; or set skip_bad_rows = True to count and skip bad rows")


def _check_normalisable(
    path: str, statistics: RewardStatistics, train_rows: int, low: float, high: float
) -> None:
    if statistics.std == 0:
        raise UsageError(
            f"{path}: field 'reward' is the same ({statistics.mean:.6g}) in all {train_rows} rows of "
            "the training split (variance 0), so there is nothing to learn; give rows that differ"
        )
    furthest = max(abs(statistics.normalise(low)), abs(statistics.normalise(high)))
    if not furthest <= LARGEST_FLOAT32:
        raise UsageError(
            f"{path}: field 'reward' runs from {low:.6g} to {high:.6g}, too far apart for a standard "
            f"deviation of {statistics.std:.6g} in the training split; correct the outliers"
        )


def _prompt_digest(prompt: str) -> bytes:
    # Not hash(): Python salts it, so the split would change from one process to the next.
    return hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).digest()
