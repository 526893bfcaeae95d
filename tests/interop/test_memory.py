"""A model passes through memory array by array, however large it is."""

import sys

import pytest
from memory_of_conversion import run


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory in use")
@pytest.mark.parametrize("other", ["huggingface", "t5x"])
def test_memory_does_not_grow_with_the_model(tmp_path, other):
    sizes = (100, 300)
    small, large = (run(tmp_path / str(size), size, other=other) for size in sizes)
    assert large["largest_array_bytes"] == small["largest_array_bytes"]
    added = large["model_bytes"] - small["model_bytes"]
    assert added > 15 * large["largest_array_bytes"]
    for name in ("import_bytes", "export_bytes"):
        # One copy of what was added would be 1.
        assert large[name] - small[name] < 0.4 * added, (name, small, large)
