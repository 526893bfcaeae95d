"""Opens an exported folder with the real transformers and compares it with what dro_jax computed.

    python tests/interop/check_with_transformers.py FOLDER EXPECTED.npz

needs torch, transformers and sentencepiece, and nothing of dro_jax. EXPECTED.npz holds encoder_tokens [B, Ti],
decoder_tokens [B, To], logits [B, To, V], texts [K], token_ids [K, L] (padded with 0), greedy [B, steps] of cached
decoding; where the folder has a value network also values [K], which the code in its README.md has to compute. Prints
as JSON the largest differences and what is equal; tests/cli/test_convert.py says what they have to be.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


@torch.no_grad()
def compare(folder: Path, expected: dict[str, np.ndarray]) -> dict[str, object]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(expected["encoder_tokens"]).long()
    inputs = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    decoder_tokens = torch.from_numpy(expected["decoder_tokens"]).long()

    def difference(logits: torch.Tensor) -> float:
        logits = logits.float()
        for entry in model.generation_config.suppress_tokens or []:
            logits[..., entry] = float(expected["logits"][..., entry].flat[0])
        return float((logits - torch.from_numpy(expected["logits"])).abs().max())

    steps = expected["greedy"].shape[1]
    greedy = model.generate(**inputs, do_sample=False, max_new_tokens=steps)[:, 1:].numpy()
    greedy = np.pad(greedy, ((0, 0), (0, steps - greedy.shape[1])))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([str(text) for text in expected["texts"]]).input_ids
    wanted = [[i for i in row if i] for row in expected["token_ids"].tolist()]
    undecodable = []
    for entry in range(model.config.vocab_size):
        try:
            tokenizer.decode([entry])
        except ValueError:
            undecodable.append(entry)
    result = {
        "transformers": transformers.__version__,
        "dtype": str(model.dtype),
        "tied": model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr(),
        "logits": difference(model(**inputs, decoder_input_ids=decoder_tokens).logits),
        "greedy": bool(np.array_equal(greedy, expected["greedy"])),
        "token_ids": ids == wanted,
        "undecodable": undecodable,
        "max_new_tokens": model.generation_config.max_new_tokens,
        "suppressed": model.generation_config.suppress_tokens,
    }
    if "values" in expected:
        readme = (folder / "value" / "README.md").read_text()
        (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
        assert block.count('["a prompt"]') == 1
        names = {"texts": [str(text) for text in expected["texts"]]}
        with contextlib.chdir(folder):
            exec(block.replace('["a prompt"]', "texts"), names)
        values = names["value"][:, 0].numpy()
        result["values"] = float(np.abs(values - expected["values"]).max())
    in_half = model.bfloat16()(**inputs, decoder_input_ids=decoder_tokens).logits
    return result | {"logits_bfloat16": difference(in_half)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with np.load(sys.argv[2]) as file:
        print(json.dumps(compare(Path(sys.argv[1]), dict(file))))
