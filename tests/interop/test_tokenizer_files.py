"""Tokenisers of Hugging Face folders give the ids that transformers gave, or are refused."""

import json
import shutil

import pytest
import sentencepiece
from etils import epath

from dro_jax.data.vocabulary import encode_prompt, load_vocabulary
from dro_jax.errors import UsageError
from dro_jax.interop import huggingface, tokenizer_files


def found(folder):
    folder = epath.Path(folder)
    return tokenizer_files.find_vocabulary(folder, huggingface.read_config(folder))


def refusal(folder):
    with pytest.raises(UsageError, match=r"^[^\n]*$") as refused:
        found(folder)
    return str(refused.value)


def edit(path, **entries):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


def test_the_same_ids(golden):
    path = found(golden.folder)
    assert (path is None) == (golden.folder.name == "byt5")
    vocabulary = load_vocabulary(path)
    for text, ids in zip(golden.arrays["texts"], golden.arrays["token_ids"], strict=True):
        if path is None and "<extra_id" in text:
            continue  # a sentinel for ByT5's tokeniser, letters for ours
        assert encode_prompt(vocabulary, str(text), 99) == [i for i in ids.tolist() if i]


def test_what_is_written_is_found_again(golden, tmp_path):
    path = found(golden.folder)
    size = huggingface.read_config(epath.Path(golden.folder))["vocab_size"]
    tokenizer_files.write_tokenizer(epath.Path(tmp_path), path, size)
    shutil.copy(golden.folder / "config.json", tmp_path)
    again = found(tmp_path)
    assert (again is None) == (path is None)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if path is None:
        assert described == {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    else:
        assert epath.Path(again).read_bytes() == epath.Path(path).read_bytes()
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        assert described == {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, **names}


def test_other_numbers_than_t5_s_are_refused(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "other"),
        vocab_size=19,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = str(tmp_path / "other.model")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as refused:
        tokenizer_files.write_tokenizer(epath.Path(tmp_path), path, 128)
    assert str(refused.value).startswith(
        f"{path}: has padding, end of sequence and unknown at [0, 2, 1], and transformers takes"
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pad_token_id": 3}, "pad_token_id is 3, but the tokeniser's padding is 0;"),
        ({"eos_token_id": 2}, "eos_token_id is 2, but the tokeniser's end of sequence is 1;"),
        ({"eos_token_id": [1, 5]}, "eos_token_id is [1, 5], but the tokeniser's end of"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id is 5, but what a T5 of dro_jax"),
    ],
)
def test_special_tokens_of_model_and_tokeniser(copied, entries, message):
    for name in ("v1_1", "byt5"):
        folder = copied(name)
        edit(folder / "config.json", **entries)
        assert refusal(folder).startswith(f"{folder / 'config.json'}: {message}")
        edit(folder / "config.json", pad_token_id=0, eos_token_id=[1], decoder_start_token_id=0)
        found(folder)


def test_more_tokens_than_the_model_has(copied):
    folder = copied("v1_1")
    edit(folder / "config.json", vocab_size=133)
    assert "the vocabulary has 134 tokens but the model's vocab_size is 133" in refusal(folder)


def test_folder_without_the_sentencepiece_model(copied):
    folder = copied("v1_1")
    (folder / "spiece.model").unlink()
    line = refusal(folder)
    assert line.startswith(f"{folder}: has no spiece.model (tokenizer.json alone does not do)")
    (folder / "tokenizer.json").unlink()
    assert f"{folder}: has no spiece.model (nor ByT5's); copy the one" in refusal(folder)


def test_other_sentinels(copied):
    folder = copied("v1_0")
    edit(folder / "tokenizer_config.json", extra_ids=0)
    assert "tokenizer_config.json: extra_ids is 0; a vocabulary of dro_jax" in refusal(folder)


@pytest.mark.parametrize("number", [134, 40, 5, -1])
def test_tokens_that_were_added(copied, number):
    expected = f"token {number} is '<mine>', which spiece.model with 100 sentinels does not have"
    folder = copied("v1_0")
    entry = {str(number): {"content": "<mine>"}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=entry)
    assert expected in refusal(folder)
    folder = copied("v1_1")
    edit(folder / "tokenizer.json", added_tokens=[{"id": number, "content": "<mine>"}])
    assert expected in refusal(folder)
    entry = {"1": {"content": "</s>"}, "133": {"content": "<extra_id_0>"}}
    edit(folder / "tokenizer.json", added_tokens=[])
    edit(folder / "tokenizer_config.json", added_tokens_decoder=entry)
    found(folder)


def test_added_tokens_that_make_no_sense(copied):
    folder = copied("v1_0")
    for listed in ({"x": {"content": "a"}}, {"1": "</s>"}, ["</s>"]):
        edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
        assert "lists as added tokens cannot be read; get them again" in refusal(folder)
    folder = copied("v1_1")
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 1e999, "content": "a"}]}')
    assert "lists as added tokens cannot be read; get them again" in refusal(folder)


def test_bytes_by_the_model_s_own_file(copied):
    folder = copied("byt5")
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "config.json", tokenizer_class="ByT5Tokenizer")
    assert found(folder) is None
