"""Packing: several examples in one row, so that little of it is padding. NumPy only.

Examples come in windows of a couple of thousand, in the order of training; each window is packed whole, the
longest first, which fills rows better than any few open rows can, and leaves nothing over: where a window
begins and ends is all that a resumed run has to know.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

WINDOW = 2048
"""Examples packed together."""

Example = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]

_DECODER = {"targets": "decoder", "mismatched_targets": "mismatched_decoder"}


def pack(lengths: np.ndarray, limits: Sequence[int], max_examples: int) -> list[list[int]]:
    """Assigns examples to rows by best fit, the largest first.

    An example goes to the row with least room left of those that can take it, and to a new row where none
    can. Deterministic; the same examples in another order fill as many rows, but for ties.

    Args:
        lengths: int [examples, features], tokens of each; none is over its limit.
        limits: tokens a row holds of each feature.
        max_examples: the most examples a row holds.

    Returns:
        Rows of example numbers; each number is in exactly one row.

    Raises:
        ValueError: an example is longer than a row.
    """
    capacity = np.asarray(limits, np.int64)
    if np.any(lengths > capacity):
        raise ValueError(f"an example of {lengths.max(axis=0)} tokens does not fit {limits}")
    if max_examples == 1:
        return [[number] for number in range(len(lengths))]
    shares = lengths / capacity
    largest_first = np.argsort(-shares.max(axis=1), kind="stable")
    rows: list[list[int]] = []
    # [features, rows]: NumPy is twice as fast along the rows.
    room = np.empty((len(capacity), len(lengths)), np.int64)
    slots = np.empty(len(lengths), np.int64)
    for number in largest_first:
        left = room[:, : len(rows)] - lengths[number, :, np.newaxis]
        # Room left as a share of the row, all features together; more than that where it does not fit.
        share = (left / capacity[:, np.newaxis]).sum(axis=0)
        share[(left.min(axis=0) < 0) | (slots[: len(rows)] == 0)] = np.inf
        row = int(np.argmin(share)) if len(rows) else 0
        if not len(rows) or share[row] == np.inf:
            row = len(rows)
            rows.append([])
            room[:, row], slots[row] = capacity, max_examples
        rows[row].append(int(number))
        room[:, row] -= lengths[number]
        slots[row] -= 1
    return rows


def packed_batches(
    examples: Sequence[Example],
    *,
    lengths: Mapping[str, int],
    max_examples: int,
    batch_size: int,
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yields examples in batches of packed rows, each with the numbers of the examples in its rows.

    Args:
        examples: as of `fill_rows`, none over its limit.
        lengths: tokens a row holds of "inputs" and "targets".
        max_examples: slots a row has.
        batch_size: rows of every batch; where examples run out, rows are empty and have no numbers.
    """
    for start in range(0, len(examples), WINDOW):
        window = examples[start : start + WINDOW]
        limits = [lengths["inputs"], lengths["targets"]]
        rows = pack(text_lengths(window), limits, max_examples)
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            filled = [[window[i] for i in row] for row in some]
            empty: list[list[Example]] = [[] for _ in range(batch_size - len(some))]
            batch = fill_rows([*filled, *empty], lengths=lengths, max_examples=max_examples)
            yield batch, [[start + i for i in row] for row in some]


def score_examples(
    score: Callable[[Batch], np.ndarray],
    examples: Sequence[Example],
    *,
    lengths: Mapping[str, int],
    max_examples: int,
    batch_size: int,
) -> np.ndarray:
    """Computes one number an example in packed rows.

    Args:
        score: from a batch of `packed_batches` to numbers [rows, N]; empty rows at its end may be left out.
        examples: as of `packed_batches`, like the other arguments.

    Returns:
        float64 [examples], in their order.
    """
    scores = np.zeros(len(examples), np.float64)
    for batch, rows in packed_batches(
        examples, lengths=lengths, max_examples=max_examples, batch_size=batch_size
    ):
        of_rows = score(batch)
        for row, numbers in enumerate(rows):
            scores[numbers] = of_rows[row, : len(numbers)]
    return scores


def fill_rows(
    rows: Sequence[Sequence[Example]], *, lengths: Mapping[str, int], max_examples: int
) -> Batch:
    """Builds a batch, the arrays that every network and loss here takes, from the examples of its rows.

    Args:
        rows: the examples of each row, in the order of its segments: `inputs`, `targets` (and
            `mismatched_targets`), int32 [length], end of sequence included; all else is one number an
            example, [1]: `rewards` (and `reference_log_probs`, ...). A row may be empty, but not all.
        lengths: tokens a row holds of "inputs" and "targets".
        max_examples: N, slots a row has; 1 gives rows without segment ids.

    Returns:
        int32 [rows, length]: encoder_input_tokens, decoder_target_tokens, decoder_input_tokens (the targets
        shifted right behind a 0 where an example starts) and decoder_loss_weights (1 at tokens); packed
        also encoder_ and decoder_segment_ids (a row's k-th example is k + 1) and _positions. Of other prompts'
        completions, mismatched_decoder_ and so on. float32 [rows, N]: rewards, reward_weights (1 where there
        is an example), and any other number. The names are T5X's; all is 0 where nothing is.
    """
    names = sorted(next(row[0] for row in rows if row))
    batch: Batch = {"reward_weights": np.zeros((len(rows), max_examples), np.float32)}
    for name in names:
        if name == "inputs":
            batch |= _fill_text(rows, name, "encoder", lengths["inputs"], max_examples > 1)
        elif name in _DECODER:
            prefix = _DECODER[name]
            batch |= _fill_text(rows, name, prefix, lengths["targets"], max_examples > 1)
            tokens, starts = batch[f"{prefix}_target_tokens"], batch.pop(f"{prefix}_starts")
            shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
            batch[f"{prefix}_input_tokens"] = np.where(starts, 0, shifted)
        else:
            batch[name] = np.zeros((len(rows), max_examples), np.float32)
    for row, examples in enumerate(rows):
        batch["reward_weights"][row, : len(examples)] = 1
        for name in names:
            if name != "inputs" and name not in _DECODER:
                batch[name][row, : len(examples)] = [example[name][0] for example in examples]
    return batch


def _fill_text(
    rows: Sequence[Sequence[Example]], name: str, prefix: str, width: int, packed: bool
) -> Batch:
    """Tokens of one feature, and where each text starts and ends: arrays [rows, width]."""
    tokens, weights, starts, segments, positions = np.zeros((5, len(rows), width), np.int32)
    for row, examples in enumerate(rows):
        start = 0
        for slot, example in enumerate(examples, 1):
            stop = start + len(example[name])
            tokens[row, start:stop] = example[name]
            weights[row, start:stop] = 1
            starts[row, start] = 1
            segments[row, start:stop] = slot
            positions[row, start:stop] = np.arange(stop - start)
            start = stop
    if prefix == "encoder":
        arrays = {"encoder_input_tokens": tokens}
    else:
        arrays = {
            f"{prefix}_target_tokens": tokens,
            f"{prefix}_loss_weights": weights,
            f"{prefix}_starts": starts,
        }
    if packed:
        arrays |= {f"{prefix}_segment_ids": segments, f"{prefix}_positions": positions}
    return arrays


def text_lengths(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each text of each example: int64 [examples, features]; "inputs" is the first feature."""
    names = ["inputs", *(name for name in _DECODER if name in examples[0])]
    return np.array([[len(example[name]) for name in names] for example in examples], np.int64)
