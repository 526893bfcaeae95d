"""`dro_jax` with a record of the rows that every step is given: `recorded.py RECORD train …`."""

import hashlib
import os
import sys

import numpy as np

from dro_jax.cli.main import main
from dro_jax.training import loop

record = f"{sys.argv[1]}.{os.getpid()}"
original = loop.to_devices
train = loop.train


def train_recorded(state, *arguments, **options):
    step = int(state.step)

    def to_devices(batch, sharding):
        nonlocal step
        arrays = original(batch, sharding)
        step += 1
        lines = []
        names = ("encoder_input_tokens", "decoder_target_tokens", "rewards")
        for shards in zip(*(arrays[name].addressable_shards for name in names), strict=True):
            if shards[0].replica_id == 0:
                for row in zip(*(np.asarray(shard.data) for shard in shards), strict=True):
                    digest = hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest()
                    lines.append(f"{step} {digest}\n")
        with open(record, "a") as file:
            file.writelines(lines)
        return arrays

    loop.to_devices = to_devices
    return train(state, *arguments, **options)


loop.train = train_recorded
sys.exit(main(sys.argv[2:]))
