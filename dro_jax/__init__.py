"""Direct Reward Optimisation (arXiv 2405.19107) of T5 models from single-trajectory feedback."""

__version__ = "0.1.0"
