"""Models of the Hugging Face hub by their names."""

from etils import epath

from dro_jax.errors import UsageError
from dro_jax.interop.huggingface import PICKLE

FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)


def download(name: str) -> epath.Path:
    """Fetches a model into the hub's cache on this machine, without anything that could run.

    Args:
      name: as in "google/flan-t5-small".

    Returns:
      Its folder.

    Raises:
      UsageError: if huggingface_hub is not installed, the hub cannot be reached or has no such model, or only pickles.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name}: no such folder; to fetch a model of that name from the hub: pip install 'dro_jax[hf]'"
        ) from error
    try:
        folder = epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
        files = [] if any(folder.glob("*.safetensors")) else huggingface_hub.list_repo_files(name)
    # Its own errors, its HTTP client's and the operating system's have nothing else in common.
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(
            f"{name}: no such folder, and the hub does not give a model of that name ({reason}); check the name and "
            "the network"
        ) from error
    if pickled := [file for file in files if file.endswith(".bin")]:
        raise UsageError(f"{name}: has no safetensors on the hub; {pickled[0]} {PICKLE}")
    return folder
