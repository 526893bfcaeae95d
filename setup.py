"""Installs dro_jax with its gin files as package data, and the dro_jax command."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Bounds name the oldest version the tests have passed with, or why a newer one is kept out.
REQUIREMENTS = [
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "seqio",
    "tensorflow",
    "tensorflow-datasets",
    "gin-config",
    "clu",
    "tensorboard",  # clu's metric writers need it and do not pull it in.
    "etils[epath]",
    "rich",
    "sentencepiece",
]

TEST = ["pytest", "pytest-xdist"]

EXTRAS = {
    "test": TEST,
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "hf": ["safetensors", "transformers"],
    "t5x": [],
    "bench": [],
}

setup(
    name="dro_jax",
    version="0.1.0",
    description="Direct Reward Optimisation of T5 models in JAX, from single-trajectory feedback",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dro_jax", "dro_jax.*"]), "dro_jax.gin_configs"],
    package_dir={"dro_jax.gin_configs": "gin_configs"},
    package_data={"dro_jax.gin_configs": ["**/*.gin"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dro_jax = dro_jax.cli.main:main"]},
)
