"""One of the two processes of `test_equivalence`: trains three methods on four of eight devices.

Arguments: port of the coordinator, number of this process, file to write the histories to.
"""

import json
import sys
from pathlib import Path

import jax
from benches import make_bench
from equivalence import METHODS, OPTIMIZERS, history, packed_batch

from dro_jax.training import processes


def main(port: str, number: str, output: str) -> None:
    processes.start(f"localhost:{port}", 2, int(number))
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    found = {
        method: history(
            make_bench((2, 2, 2), METHODS[method], OPTIMIZERS["descent"]), packed_batch
        )[0]
        for method in ("dro_v", "dro_p", "kto")
    }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
