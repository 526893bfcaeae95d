"""Which row's completion stands in for "the response to another prompt" in KTO's estimate of the KL."""

import numpy as np

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_MOST_TRIALS = 64


def mismatch_offset(prompt_ids: np.ndarray) -> int:
    """Returns by how many rows to go on, around the end, from a row to its partner.

    The same offset for every row gives each completion to exactly one other row. It lies near the golden
    section of the rows, which a file in blocks or in turns of prompts does not repeat with, and is the
    first from there that gives no row a partner of its own prompt; where the first few all do, the one
    that does so least.

    Args:
        prompt_ids: [rows], equal where prompts are.

    Returns:
        From 1 to rows - 1; 0 for a single row, whose partner is itself.
    """
    rows = len(prompt_ids)
    if rows < 2:
        return 0
    first = round(rows * _GOLDEN_RATIO)
    trials = [
        offset for step in range(min(rows, _MOST_TRIALS)) if (offset := (first + step) % rows)
    ]
    # Right for two long blocks.
    trials.append(rows // 2)
    same: list[int] = []
    for offset in trials:
        same.append(int(np.sum(prompt_ids == np.roll(prompt_ids, -offset))))
        if not same[-1]:
            return offset
    return trials[int(np.argmin(same))]
