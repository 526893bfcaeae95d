"""A model passes through memory array by array, however large it is."""

import sys

import pytest
from memory_of_conversion import run


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory in use")
def test_memory_does_not_grow_with_the_model(tmp_path):
    found = run(tmp_path, megabytes=300)
    assert found["model_bytes"] > 30 * found["largest_array_bytes"]
    # One copy of the model would be 1; the threads' buffers are a fifth of a gigabyte for any model.
    assert found["import_bytes"] < 0.8 * found["model_bytes"], found
    assert found["export_bytes"] < 0.8 * found["model_bytes"], found
