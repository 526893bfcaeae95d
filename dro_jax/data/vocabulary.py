"""Vocabularies, and the one way in which prompts and completions become tokens."""

import seqio
from etils import epath
from google.protobuf.message import DecodeError

from dro_jax.errors import UsageError

_SENTINELS = 100


def load_vocabulary(path: str | None) -> seqio.Vocabulary:
    """Returns the byte vocabulary (None), or T5's: the SentencePiece model at `path` + 100 sentinels.

    Raises:
        UsageError: the file is missing, is not a SentencePiece model, or does not number its
            tokens as T5 does (padding 0, an end of sequence).
    """
    if path is None:
        return seqio.ByteVocabulary()
    if not epath.Path(path).exists():
        raise UsageError(f"{path}: no such file; give a SentencePiece model, or None for bytes")
    if epath.Path(path).is_dir():
        raise UsageError(f"{path}: is a directory; name the SentencePiece model file in it")
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=_SENTINELS)
    try:
        vocabulary.load_model()
    except (DecodeError, RuntimeError, OSError) as error:
        raise UsageError(
            f"{path}: is not a SentencePiece model; give one (spiece.model), or None for bytes"
        ) from error
    if vocabulary.tokenizer.pad_id() != 0 or vocabulary.eos_id < 1:
        raise UsageError(
            f"{path}: has padding id {vocabulary.tokenizer.pad_id()} and end-of-sequence id "
            f"{vocabulary.eos_id}; T5 needs padding id 0 and an end of sequence: train it so"
        )
    return vocabulary


def check_vocabulary_fits(
    vocabulary: seqio.Vocabulary, model_vocab_size: int, *, reserved_entry: bool = False
) -> None:
    """Refuses a vocabulary with more tokens than the model has entries for.

    Args:
        vocabulary: of prompts and completions.
        model_vocab_size: entries of the model.
        reserved_entry: whether the last of them is no token.

    Raises:
        UsageError: the vocabulary is larger.
    """
    entries = model_vocab_size - reserved_entry
    if vocabulary.vocab_size > entries:
        raise UsageError(
            f"the vocabulary has {vocabulary.vocab_size} tokens but the model's vocab_size is "
            f"{model_vocab_size}{', the last of which is the value' if reserved_entry else ''}; give the "
            "vocabulary the model was trained with, or raise vocab_size"
        )


def encode_prompt(vocabulary: seqio.Vocabulary, text: str, max_length: int) -> list[int]:
    """Returns a prompt's tokens, at most `max_length`; the end of sequence is kept when it is cut."""
    return [*vocabulary.encode(text)[: max_length - 1], vocabulary.eos_id]


def encode_completion(vocabulary: seqio.Vocabulary, text: str, max_length: int) -> list[int]:
    """Returns a completion's tokens, at most `max_length`.

    A completion that does not fit together with its end of sequence is cut, and then has none: the
    text did not end there.
    """
    return [*vocabulary.encode(text), vocabulary.eos_id][:max_length]
