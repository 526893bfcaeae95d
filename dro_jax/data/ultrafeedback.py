"""UltraFeedback's own schema (arXiv 2310.01377): one record a prompt, with four rated completions."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from dro_jax.data.records import LARGEST_FLOAT32

Score = Literal["fine_grained", "overall"]
"""What a completion is rewarded by."""

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def is_record(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record has UltraFeedback's schema."""
    return "instruction" in fields and "completions" in fields


def flatten(fields: Mapping[str, Any], score: Score) -> Iterator[dict[str, Any]]:
    """Yields a record's completions as {"prompt", "completion", "reward", "model"}, to be judged as rows.

    Args:
        fields: the record.
        score: "fine_grained", the mean of the four aspects' ratings, or "overall", the critique's
            overall_score (wrong in some rows of the first release).

    Yields:
        One row a completion; `reward` is None where nobody rated it (all ratings "N/A"). What is no
        completion, and a record without any, gives a row that is refused.
    """
    rate = overall_score if score == "overall" else fine_grained_score
    completions = fields["completions"]
    if not isinstance(completions, list) or not completions:
        # One that is refused, below.
        completions = [[completions]]
    for completion in completions:
        rated = isinstance(completion, Mapping)
        yield {
            "prompt": fields["instruction"],
            # Not the thing itself: a string would pass for a completion's text.
            "completion": completion.get("response") if rated else {"completions": completion},
            "reward": rate(completion) if rated else 0.0,
            "model": completion.get("model") if rated else None,
        }


def overall_score(completion: Mapping[str, Any]) -> Any:
    """Returns overall_score (1 to 10), a number even where it is written as text; None for "N/A"."""
    return _number(completion.get("overall_score"))


def fine_grained_score(completion: Mapping[str, Any]) -> Any:
    """Returns the mean of the ratings (1 to 5) that are not "N/A"; None where all are.

    Without any ratings, the completion's own "fine-grained_score".
    """
    annotations = completion.get("annotations")
    given = [_rating(annotations, aspect) for aspect in ASPECTS]
    # Parquet gives every annotation a null where there are none.
    if all(rating is None for rating in given):
        return _number(completion.get("fine-grained_score"))
    ratings = [number for number in map(_number, given) if number is not None]
    for number in ratings:
        # What the judge of rows will refuse has no mean.
        if isinstance(number, bool) or not isinstance(number, int | float):
            return number
        if not abs(number) <= LARGEST_FLOAT32:
            return number
    return math.fsum(ratings) / len(ratings) if ratings else None


def _rating(annotations: Any, aspect: str) -> Any:
    annotation = annotations.get(aspect) if isinstance(annotations, Mapping) else None
    return annotation.get("Rating") if isinstance(annotation, Mapping) else annotation


def _number(value: Any) -> Any:
    """A rating as a number; None for "N/A"; anything else as it stands, for the judge of rows to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.upper() in ("N/A", "NA", ""):
        return None
    try:
        return float(text)
    except ValueError:
        return value
