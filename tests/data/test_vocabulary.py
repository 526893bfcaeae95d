"""Vocabularies that load, those that are refused, and the end of sequence when a text is cut."""

import pytest
import sentencepiece
import seqio

from dro_jax.data import vocabulary
from dro_jax.errors import UsageError


def test_bytes_by_default():
    loaded = vocabulary.load_vocabulary(None)
    assert loaded == seqio.ByteVocabulary()
    assert loaded.vocab_size == 259


def test_sentencepiece_by_path(sentencepiece_path):
    loaded = vocabulary.load_vocabulary(sentencepiece_path)
    assert loaded.vocab_size == 30 + 100
    assert (loaded.pad_id, loaded.eos_id) == (0, 1)
    assert loaded.decode(vocabulary.encode_prompt(loaded, "red fox", 64)) == "red fox"
    assert loaded.encode("<extra_id_0>")[-1] == 129


@pytest.mark.parametrize("content", [b"", b"a text file\n", bytes(range(256)) * 9])
def test_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"spiece.model: is not a SentencePiece model; give one"):
        vocabulary.load_vocabulary(str(path))


def test_missing_model_and_directory(tmp_path):
    with pytest.raises(UsageError, match=r"absent.model: no such file; give a SentencePiece model"):
        vocabulary.load_vocabulary(str(tmp_path / "absent.model"))
    with pytest.raises(UsageError, match=r": is a directory; name the SentencePiece model file"):
        vocabulary.load_vocabulary(str(tmp_path))


def test_model_numbered_otherwise_than_t5(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "llama"), vocab_size=30, minloglevel=2
    )
    with pytest.raises(UsageError, match=r"has padding id -1 and end-of-sequence id 2; T5 needs"):
        vocabulary.load_vocabulary(str(tmp_path / "llama.model"))


def test_vocabulary_has_to_fit_the_model():
    vocabulary.check_vocabulary_fits(seqio.ByteVocabulary(), 259)
    with pytest.raises(UsageError, match=r"has 259 tokens but the model's vocab_size is 258; give"):
        vocabulary.check_vocabulary_fits(seqio.ByteVocabulary(), 258)
    vocabulary.check_vocabulary_fits(seqio.ByteVocabulary(), 260, reserved_entry=True)
    with pytest.raises(
        UsageError, match=r"vocab_size is 259, the last of which is the value; give"
    ):
        vocabulary.check_vocabulary_fits(seqio.ByteVocabulary(), 259, reserved_entry=True)


@pytest.mark.parametrize(
    ("max_length", "prompt", "completion"),
    [
        (5, [100, 101, 102, 1], [100, 101, 102, 1]),
        (4, [100, 101, 102, 1], [100, 101, 102, 1]),
        (3, [100, 101, 1], [100, 101, 102]),
        (2, [100, 1], [100, 101]),
    ],
)
def test_end_of_sequence(max_length, prompt, completion):
    letters = bytes([97, 98, 99]).decode()
    encoded = vocabulary.encode_prompt(seqio.ByteVocabulary(), letters, max_length)
    assert encoded == prompt
    encoded = vocabulary.encode_completion(seqio.ByteVocabulary(), letters, max_length)
    assert encoded == completion
