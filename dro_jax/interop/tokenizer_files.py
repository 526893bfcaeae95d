"""The tokeniser in a Hugging Face folder: T5's SentencePiece model with 100 sentinels, or ByT5's bytes."""

from collections.abc import Mapping
from typing import Any

import seqio
from etils import epath

from dro_jax.data.vocabulary import check_vocabulary_fits, load_vocabulary
from dro_jax.errors import UsageError
from dro_jax.interop.huggingface import CONFIG, read_json, write_json

SENTENCEPIECE = "spiece.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
"""Names inside a model's folder."""

_SENTINELS = 100


def find_vocabulary(folder: epath.Path, config: Mapping[str, Any]) -> str | None:
    """The vocabulary of a model's folder, once it is known to number tokens as the model does.

    Args:
      folder: of the model.
      config: its config.json.

    Returns:
      The SentencePiece model's path, None for bytes: what `load_vocabulary` takes.

    Raises:
      UsageError: if there is no tokeniser that can be read, or it is another model's.
    """
    described = folder / TOKENIZER_CONFIG
    tokenizer = read_json(described) if described.exists() else {}
    kind = tokenizer.get("tokenizer_class", config.get("tokenizer_class"))
    if kind == "ByT5Tokenizer":
        path = None
    elif (folder / SENTENCEPIECE).exists():
        path = str(folder / SENTENCEPIECE)
    else:
        there = f"{TOKENIZER} alone does not do" if (folder / TOKENIZER).exists() else "nor ByT5's"
        raise UsageError(
            f"{folder}: has no {SENTENCEPIECE} ({there}); copy the one of the model that this was trained from"
        )
    vocabulary = load_vocabulary(path)
    _check_ids(folder, config, vocabulary)
    if path is not None:
        if tokenizer.get("extra_ids", _SENTINELS) != _SENTINELS:
            raise UsageError(
                f"{described}: extra_ids is {tokenizer['extra_ids']}; a vocabulary of dro_jax has T5's {_SENTINELS}"
            )
        _check_added(folder, tokenizer, vocabulary)
    return path


def write_tokenizer(folder: epath.Path, vocabulary_file: str | None, vocab_size: int) -> None:
    """Writes what AutoTokenizer reads as this vocabulary, with the same ids.

    Args:
      folder: where to.
      vocabulary_file: a SentencePiece model, None for bytes.
      vocab_size: entries of the model's table.

    Raises:
      UsageError: if transformers has no such vocabulary for a T5.
    """
    if vocabulary_file is None:
        # transformers cannot decode an entry without a name; ByT5's 125 beside the bytes are sentinels.
        extra_ids = vocab_size - load_vocabulary(None).vocab_size
        described = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": extra_ids}
        write_json(folder / TOKENIZER_CONFIG, described)
        return
    pieces = load_vocabulary(vocabulary_file).tokenizer
    ids = {"pad_token": pieces.pad_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    if list(ids.values()) != [0, 1, 2]:
        raise UsageError(
            f"{vocabulary_file}: has padding, end of sequence and unknown at {list(ids.values())}, and transformers "
            "takes those of a T5 to be at [0, 1, 2]; give --format=t5x, which keeps them"
        )
    epath.Path(vocabulary_file).copy(folder / SENTENCEPIECE)
    names = {name: pieces.id_to_piece(number) for name, number in ids.items()}
    write_json(
        folder / TOKENIZER_CONFIG,
        {"tokenizer_class": "T5Tokenizer", "extra_ids": _SENTINELS, **names},
    )


def _check_ids(folder: epath.Path, config: Mapping[str, Any], vocabulary: seqio.Vocabulary) -> None:
    try:
        check_vocabulary_fits(vocabulary, config["vocab_size"])
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    for name, needed, what in (
        ("pad_token_id", 0, "the tokeniser's padding"),
        ("eos_token_id", vocabulary.eos_id, "the tokeniser's end of sequence"),
        ("decoder_start_token_id", 0, "what a T5 of dro_jax starts with"),
    ):
        said = config.get(name)
        if said not in (None, needed, [needed]):
            raise UsageError(
                f"{folder / CONFIG}: {name} is {said}, but {what} is {needed}; give model and tokeniser that belong "
                "together"
            )


def _check_added(
    folder: epath.Path, tokenizer: Mapping[str, Any], vocabulary: seqio.Vocabulary
) -> None:
    """Refuses tokens that the tokeniser has beside the SentencePiece model."""
    described = tokenizer.get("added_tokens_decoder") or {}
    fast = folder / TOKENIZER
    listed = (read_json(fast).get("added_tokens") or []) if fast.exists() else []
    try:
        added = {int(number): str(token["content"]) for number, token in described.items()}
        added |= {int(token["id"]): str(token["content"]) for token in listed}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{folder}: what {TOKENIZER_CONFIG} or {TOKENIZER} lists as added tokens cannot be read; get them again"
        ) from error
    for number, content in sorted(added.items()):
        known = 0 <= number < vocabulary.vocab_size
        piece = vocabulary.tokenizer.id_to_piece(number) if known else None
        # SeqIO's sentinels carry the mark of a word's beginning.
        if piece is None or piece.lstrip("\u2581") != content:
            raise UsageError(
                f"{folder}: token {number} is {content!r}, which {SENTENCEPIECE} with {_SENTINELS} sentinels does "
                "not have; tokens that were added later do not convert"
            )
