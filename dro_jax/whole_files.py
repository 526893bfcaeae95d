"""Files that are there whole or not at all, however the process ends."""

import contextlib
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a place beside a file to write to, from where it is moved into its own when all is written.

    Args:
      path: of the file; one that is there stays until the new one is whole.

    Yields:
      Where to write. What an interruption leaves there is written over the next time.
    """
    path = epath.Path(path)
    partial = path.parent / f"{path.name}.partial"
    yield partial
    partial.replace(path)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file, text in UTF-8, as a whole."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
