"""Writes golden/*.npz: small random T5s, and what Hugging Face transformers computes with them.

Run it in an environment of its own, which the tests never need, and commit what changed:

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/networks/make_golden.py

The weights come from NumPy's generator and are scaled so that states and logits are of order 1: with
transformers' own initialisation they are so large that a difference of 1e-5 would be rounding. The versions used
are in every file. Keys of a file:

    weight/<name>      float32, transformers' name and layout
    encoder_tokens     int64 [B, Ti], 0 is padding, which the attention mask hides
    decoder_tokens     int64 [B, To], the start token 0 first
    targets            int64 [B, To]
    encoder_states     float32 [B, Ti, E]
    logits             float32 [B, To, V]
    label_log_probs    float32 [B, To]
    greedy             int64 [B, steps], what `generate` appends to the start token (0 after end-of-sequence, 1)
    beams              int64 [B, steps], likewise of a beam search (1 or 0 after end-of-sequence)
    distances          int64 [K], key position minus query position
    encoder_buckets, decoder_buckets    int64 [K], relative-position buckets of `distances`
    about              JSON: config, versions
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # 1.1 and FLAN
RELU = {"feed_forward_proj": "relu", "tie_word_embeddings": True}  # 1.0

# `prompts` are the encoder lengths of the rows: the longest fills its row, the others are padded.
# `beams` are the number of beams and the length penalty.
# The seeds were chosen for greedy answers that are not all one token, some ending early.
CASES = {
    "v1_1": {
        "config": GATED | {"d_model": 16, "num_heads": 4, "d_kv": 4, "d_ff": 24},
        "depths": (2, 2),
        "prompts": (12, 7, 1),
        "beams": (4, 1.0),
        "decoder_length": 9,
        "seed": 7,
    },
    "v1_0": {
        "config": RELU | {"d_model": 12, "num_heads": 3, "d_kv": 4, "d_ff": 20},
        "depths": (2, 2),
        "prompts": (10, 10, 4),
        "beams": (3, 1.0),
        "decoder_length": 8,
        "seed": 9,
    },
    "v1_1_deep_encoder_wide_heads": {
        "config": GATED | {"d_model": 16, "num_heads": 3, "d_kv": 7, "d_ff": 18},
        "depths": (3, 1),
        "prompts": (9, 3),
        "beams": (2, 0.0),
        "decoder_length": 11,
        "seed": 0,
    },
    "v1_0_deep_decoder_few_buckets": {
        "config": RELU
        | {"d_model": 8, "num_heads": 6, "d_kv": 3, "d_ff": 16}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
        "depths": (1, 3),
        "prompts": (40, 23),
        "beams": (5, 2.0),
        "decoder_length": 30,
        "seed": 5,
    },
    "v1_1_beyond_the_last_bucket": {
        "config": GATED | {"d_model": 8, "num_heads": 2, "d_kv": 4, "d_ff": 10},
        "depths": (1, 1),
        "prompts": (150, 141),
        "beams": (3, -0.5),
        "decoder_length": 140,
        "seed": 6,
    },
}
VOCAB_SIZE = 40
GREEDY_STEPS = 12


def random_weight(name: str, shape: tuple[int, ...], d_kv: int, rng) -> np.ndarray:
    """A weight that keeps the residual stream and the attention logits of order 1."""
    noise = rng.standard_normal(shape)
    if name.endswith("layer_norm.weight"):
        return 1.0 + 0.2 * noise
    if "relative_attention_bias" in name or name == "shared.weight":
        return noise
    scale = shape[1] ** -0.5  # torch stores [out, in]
    if name.endswith(".q.weight"):
        scale *= d_kv**-0.5
    if name.endswith((".o.weight", ".wo.weight")):
        scale *= 2.0  # what the layers add must not drown in the token's own embedding
    return noise * scale


def build(case: dict, rng: np.random.Generator) -> tuple[T5ForConditionalGeneration, dict]:
    """The model, and its weights by name (the untied output layer among them)."""
    encoder_layers, decoder_layers = case["depths"]
    config = T5Config(
        vocab_size=case.get("vocab_size", VOCAB_SIZE),
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        attn_implementation="eager",
        **case["config"],
    )
    model = T5ForConditionalGeneration(config).eval()
    tied = case["config"]["tie_word_embeddings"]
    assert config.scale_decoder_outputs == tied
    if not tied:
        # transformers 5 ties a new model's output layer whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    weights = {}
    for name, parameter in sorted(model.named_parameters()):  # each shared tensor once
        weights[name] = random_weight(name, tuple(parameter.shape), config.d_kv, rng).astype("f4")
        parameter.data.copy_(torch.from_numpy(weights[name]))
    assert ("lm_head.weight" in weights) == (not tied)
    return model, weights


@torch.no_grad()
def golden(name: str, case: dict) -> dict[str, np.ndarray]:
    """Everything that one file holds."""
    rng = np.random.default_rng(case["seed"])
    model, weights = build(case, rng)
    rows = len(case["prompts"])
    encoder_tokens = rng.integers(2, VOCAB_SIZE, (rows, max(case["prompts"])))
    for row, length in enumerate(case["prompts"]):
        encoder_tokens[row, length:] = 0
    targets = rng.integers(1, VOCAB_SIZE, (rows, case["decoder_length"]))
    decoder_tokens = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    inputs = {
        "input_ids": torch.from_numpy(encoder_tokens),
        "attention_mask": torch.from_numpy((encoder_tokens > 0).astype(np.int64)),
    }
    output = model(**inputs, decoder_input_ids=torch.from_numpy(decoder_tokens))
    labels = torch.from_numpy(targets)[..., None]
    log_probs = torch.log_softmax(output.logits, -1).gather(-1, labels)[..., 0]
    greedy = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=GREEDY_STEPS,
        use_cache=False,  # its cache takes the decoder to be as deep as the encoder
    )
    num_beams, length_penalty = case["beams"]
    searched = model.generate(
        **inputs,
        do_sample=False,
        num_beams=num_beams,
        length_penalty=length_penalty,
        num_return_sequences=num_beams,
        max_new_tokens=GREEDY_STEPS,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = searched.sequences_scores.reshape(rows, num_beams)
    beams = torch.zeros(rows, GREEDY_STEPS, dtype=torch.int64)
    found = searched.sequences[::num_beams, 1:]
    beams[:, : found.shape[1]] = found

    # Argmaxes must not hang on rounding, nor the comparison at 1e-5 on huge numbers.
    best = model(**inputs, decoder_input_ids=greedy[:, :-1]).logits.topk(2, -1).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, name
    assert (scores[:, 0] - scores[:, 1]).min() > 1e-3, name
    assert 0.5 < output.logits.std() < 3.0, (name, output.logits.std())

    distances = torch.arange(-200, 201)
    buckets = {
        part: T5Attention._relative_position_bucket(
            distances,
            bidirectional=part == "encoder",
            num_buckets=model.config.relative_attention_num_buckets,
            max_distance=model.config.relative_attention_max_distance,
        )
        for part in ("encoder", "decoder")
    }
    kept = (
        "d_model",
        "num_heads",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "vocab_size",
    )
    kept += ("relative_attention_num_buckets", "relative_attention_max_distance")
    about = {
        "config": {key: getattr(model.config, key) for key in kept} | case["config"],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
    }
    return {f"weight/{key}": value for key, value in weights.items()} | {
        "encoder_tokens": encoder_tokens,
        "decoder_tokens": decoder_tokens,
        "targets": targets,
        "encoder_states": output.encoder_last_hidden_state.numpy(),
        "logits": output.logits.numpy(),
        "label_log_probs": log_probs.numpy(),
        "greedy": greedy[:, 1:].numpy(),
        "beams": beams.numpy(),
        "distances": distances.numpy(),
        "encoder_buckets": buckets["encoder"].numpy(),
        "decoder_buckets": buckets["decoder"].numpy(),
        "about": np.array(json.dumps(about, sort_keys=True)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for name, case in CASES.items():
        np.savez_compressed(folder / f"{name}.npz", **golden(name, case))
        print(f"golden/{name}.npz", (folder / f"{name}.npz").stat().st_size, "bytes")
