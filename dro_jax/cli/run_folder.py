"""What lies in a run's folder beside its checkpoints, and what identifies it."""

import hashlib

import jax
from etils import epath

from dro_jax.errors import UsageError
from dro_jax.training import checkpoints

STATISTICS = "reward_statistics.json"
REFERENCE = "reference"
VOCABULARY = "vocabulary.model"
MODEL_GIN = "model.gin"
"""Names inside MODEL_DIR."""


def make_directory(directory: epath.Path) -> None:
    """Makes the run's folder. Raises UsageError where that is not possible."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{directory}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def vocabulary_digest(vocabulary_file: str | None) -> str:
    """What identifies a vocabulary: "bytes", or the SHA-256 of the SentencePiece model."""
    if vocabulary_file is None:
        return "bytes"
    return "sentencepiece:" + hashlib.sha256(epath.Path(vocabulary_file).read_bytes()).hexdigest()


def facts_of_reference(meta: checkpoints.Meta) -> checkpoints.Meta:
    """What of a run's meta (model, vocabulary, reserved_entry) a checkpoint must share to be its reference."""
    facts = {name: meta[name] for name in ("model", "vocabulary")}
    if not meta["reserved_entry"]:
        # A single net's last entry would be taken for a token.
        facts["reserved_entry"] = False
    return facts
