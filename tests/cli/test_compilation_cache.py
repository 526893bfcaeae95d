"""A second start finds the programs that the first one compiled."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def _no_cache_yet():
    """As in a process of its own; the session's cache comes back."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("_no_cache_yet")
def test_a_second_start_compiles_nothing_that_the_first_did(train, tmp_path):
    programs = []
    for name in ("first", "second"):
        result = train(
            "runs/sft_tiny.gin",
            MODEL_DIR=str(tmp_path / name),
            TRAIN_STEPS=1,
            train__train__compilation_cache_dir=str(tmp_path / "compiled"),
        )
        assert result.code == 0, result.err
        programs.append({path.name for path in (tmp_path / "compiled").glob("*-cache")})
    assert any(name.startswith("jit_train_step-") for name in programs[0])
    assert programs[0] == programs[1]
