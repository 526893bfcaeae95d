"""The `dro_jax` command: it puts data, training and evaluation together."""
