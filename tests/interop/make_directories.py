"""Writes golden/<case>/, small random T5s as Hugging Face transformers saves them, and golden/<case>.npz.

Run it in an environment of its own, which the tests never need, and commit what changed:

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.3 numpy
    python tests/interop/make_directories.py

Weights come from NumPy's generator, scaled as in tests/networks/make_golden.py. Keys of an .npz file:

    encoder_tokens     int64 [B, Ti], 0 is padding, which the attention mask hides
    decoder_tokens     int64 [B, To], the start token 0 first
    logits             float32 [B, To, V], computed in float32
    greedy             int64 [B, steps], what `generate` appends to the start token
    token_ids          int64 [texts, longest], padded with 0: what the tokeniser makes of `texts`
    texts              str [texts]
    about              JSON: versions
"""

import copy
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from transformers import AutoTokenizer, ByT5Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "networks"))
from make_golden import GATED, RELU, build

SIZES = {"d_model": 8, "num_heads": 3, "d_kv": 5, "d_ff": 10}
# 34 pieces and 100 sentinels, and two rows that no token uses.
WITH_PIECES = {"vocab_size": 136, "depths": (2, 1), "prompts": (9, 5), "decoder_length": 7}
ONE_LAYER = WITH_PIECES | {"depths": (1, 1)}

CASES = {
    "v1_1": WITH_PIECES | {"config": GATED | SIZES},
    "v1_0": WITH_PIECES | {"config": RELU | SIZES, "depths": (2, 2)},
    "v1_1_sharded": WITH_PIECES | {"config": GATED | SIZES, "shards": "8KB"},
    "v1_1_bfloat16": ONE_LAYER | {"config": GATED | SIZES, "dtype": torch.bfloat16},
    "v1_1_as_version_5_makes_them": ONE_LAYER | {"config": GATED | SIZES, "tied": True},
    "byt5": ONE_LAYER | {"config": GATED | SIZES, "vocab_size": 384},
}
# What config.json of google-t5/t5-base and google/flan-t5-base say, and version 5 says otherwise.
AS_ON_THE_HUB = {
    "v1_0": {"decoder_start_token_id": 0, "n_positions": 512, "output_past": True},
    "v1_1_sharded": {
        "decoder_start_token_id": 0,
        "n_positions": 512,
        "output_past": True,
        "tie_word_embeddings": False,
        "transformers_version": "4.23.1",
    },
}
DROPPED = {
    "v1_0": (
        "feed_forward_proj",
        "tie_word_embeddings",
        "scale_decoder_outputs",
        "dense_act_fn",
        "is_gated_act",
        "num_decoder_layers",
        "relative_attention_max_distance",
    ),
    "v1_1_sharded": ("scale_decoder_outputs",),
}
CORPUS = "the quick brown fox jumps over the lazy dog\nname a colour\nred is one\nwhat is blue? The sky.\n"
TEXTS = (
    "the quick fox",
    " name  a colour ",
    "Z\u00fcrich \u2603",
    "what is <extra_id_0> blue <extra_id_99>",
    "",
)
GREEDY_STEPS = 10


def write_sentencepiece(folder: Path) -> None:
    """A SentencePiece model numbered as T5's, which does not name the files that it was made from."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        vocab_size=34,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        normalization_rule_name="identity",  # the usual table alone is 240 kB
    )
    (folder / "spiece.model").write_bytes(model.getvalue())


def write_tokenizer(name: str, folder: Path) -> None:
    """Tokenisers as they come: SentencePiece alone on the hub, with version 5's own file beside it, bytes."""
    if name == "byt5":
        ByT5Tokenizer().save_pretrained(folder)
        return
    write_sentencepiece(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}\n')
    if name == "v1_1":
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def edit_config(name: str, folder: Path) -> None:
    """Makes config.json what older versions wrote."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | AS_ON_THE_HUB.get(name, {})
    for key in DROPPED.get(name, ()):
        del config[key]
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def golden(name: str, case: dict, seed: int, folder: Path) -> dict[str, np.ndarray] | None:
    """Writes a folder; returns what goes into its .npz, or None where rounding would decide a test."""
    rng = np.random.default_rng(seed)
    model, _ = build(case, rng)
    if case.get("tied"):
        model.lm_head.weight = model.shared.weight
        model.shared.weight.mul_(0.3)  # unscaled logits of order 1
    folder.mkdir(parents=True)
    model.to(case.get("dtype", torch.float32)).save_pretrained(
        folder, max_shard_size=case.get("shards", "50GB")
    )
    edit_config(name, folder)
    write_tokenizer(name, folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    rows, vocab_size = len(case["prompts"]), case["vocab_size"]
    encoder_tokens = rng.integers(2, vocab_size, (rows, max(case["prompts"])))
    for row, length in enumerate(case["prompts"]):
        encoder_tokens[row, length:] = 0
    decoder_tokens = rng.integers(1, vocab_size, (rows, case["decoder_length"]))
    decoder_tokens[:, 0] = 0
    inputs = {
        "input_ids": torch.from_numpy(encoder_tokens),
        "attention_mask": torch.from_numpy((encoder_tokens > 0).astype(np.int64)),
    }
    decoder_inputs = torch.from_numpy(decoder_tokens)
    logits = model(**inputs, decoder_input_ids=decoder_inputs).logits
    precise = copy.deepcopy(model).double()(**inputs, decoder_input_ids=decoder_inputs).logits
    greedy = model.generate(
        **inputs, do_sample=False, max_new_tokens=GREEDY_STEPS, decoder_start_token_id=0
    )
    best = model(**inputs, decoder_input_ids=greedy[:, :-1]).logits.topk(2, -1).values
    margin = (best[..., 0] - best[..., 1]).min()
    tokens = set(greedy.flatten().tolist())
    if (logits - precise).abs().max() > 2e-6 or margin < 3e-2 or len(tokens) < 5:
        return None
    assert 0.3 < logits.std() < 3.0, (name, logits.std())
    token_ids = AutoTokenizer.from_pretrained(folder)(list(TEXTS)).input_ids
    padded = np.zeros((len(TEXTS), max(map(len, token_ids))), np.int64)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = ids
    versions = {library.__name__: library.__version__ for library in (transformers, torch)}
    return {
        "encoder_tokens": encoder_tokens,
        "decoder_tokens": decoder_tokens,
        "logits": logits.numpy(),
        "greedy": greedy[:, 1:].numpy(),
        "token_ids": padded,
        "texts": np.array(TEXTS),
        "about": np.array(json.dumps(versions)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(__file__).parent / "golden"
    shutil.rmtree(place, ignore_errors=True)
    for name, case in CASES.items():
        content = None
        for seed in range(100):
            shutil.rmtree(place / name, ignore_errors=True)
            content = golden(name, case, seed, place / name)
            if content is not None:
                break
        assert content is not None, name
        np.savez_compressed(place / f"{name}.npz", **content)
        sizes = {path.name: path.stat().st_size for path in sorted((place / name).iterdir())}
        print(name, "seed", seed, sizes)
