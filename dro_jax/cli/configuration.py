"""Gin for the command line: finds the files, reads them, and refuses what nothing uses."""

import difflib
import functools
import logging
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import gin
from etils import epath

import dro_jax
from dro_jax.errors import UsageError

T = TypeVar("T")

_PACKAGE = Path(dro_jax.__file__).parent


def shipped_configs() -> Path:
    """The folder of gin files that comes with the library."""
    installed = _PACKAGE / "gin_configs"
    # In a checkout the files are beside the package.
    return installed if installed.is_dir() else _PACKAGE.parent / "gin_configs"


def load(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> None:
    """Replaces gin's configuration by that of the files and bindings.

    Args:
      gin_files: files, read in order; each is looked for as given, then in the search paths, then among the
        files that come with the library.
      bindings: lines like `TRAIN_STEPS = 100` that come after the files.
      search_paths: folders, several in one string with commas between them.

    Raises:
      UsageError: in one line, for a missing file, a mistake in a file or binding, a name that nothing
        refers to, or macros that still need a value.
    """
    gin.clear_config()
    folders = [path for paths in search_paths for path in paths.split(",")]
    for path in folders:
        if not epath.Path(path).is_dir():
            raise UsageError(f"--gin_search_paths={path}: no such folder")
    for path in (*folders, str(shipped_configs())):
        gin.add_config_file_search_path(path)
    for path in gin_files:
        _parse(path, functools.partial(gin.parse_config_file, path))
    for binding in bindings:
        _parse(f"--gin.{binding.replace(' = ', '=')}", functools.partial(gin.parse_config, binding))
    _check_macros()
    _parse("gin configuration", gin.finalize)


def bound(function: Callable[..., T]) -> Callable[..., T]:
    """The function as the loaded configuration binds its arguments.

    Raises:
      UsageError: if an argument cannot be made from its binding.
    """
    _parse("gin configuration", functools.partial(gin.get_bindings, function))
    return cast(Callable[..., T], gin.get_configurable(function))


def save_operative(path: epath.PathLike) -> None:
    """Writes the configuration that was really used, as a gin file."""
    epath.Path(path).write_text(gin.operative_config_str())


def _parse(what: str, parse: Callable[[], object]) -> None:
    # Gin logs an error for every search path in which a file is not.
    logging.disable(logging.ERROR)
    try:
        parse()
    except OSError as error:
        raise UsageError(
            f"{what}: {_one_line(error).partition('. Searched')[0]}; give a path, or a name below "
            "gin_configs such as runs/dro_v_tiny.gin"
        ) from error
    except (SyntaxError, tokenize.TokenError) as error:
        # Gin's own message names Python objects; the line is what helps.
        number = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        line = "" if what.startswith("--gin.") else f", line {number}"
        raise UsageError(
            f"{what}{line}: not a gin value; strings need quotes of their own, as in "
            "--gin.MODEL_DIR=\"'out'\""
        ) from error
    except UsageError as error:
        # Gin adds lines about the call that raised it.
        raise UsageError(str(error).splitlines()[0]) from error
    # Gin lets through whatever a binding or an imported module raises.
    except Exception as error:
        raise UsageError(f"{what}: {_one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _check_macros() -> None:
    """Gin accepts a misspelt macro silently: it would be a setting that sets nothing."""
    # Gin has no public view of its bindings.
    config = gin.config._CONFIG
    bound = {scope for scope, selector in config if selector == "gin.macro"}
    used = set()
    for reference in gin.config.iterate_references(config):
        name, _, selector = reference.scoped_selector.rpartition("/")
        if selector == "gin.macro":
            used.add(name)
    for name in sorted(bound - used):
        near = difflib.get_close_matches(name, sorted(used), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(used))}"
        raise UsageError(f"{name}: nothing in this configuration uses it; {hint}")
    missing = sorted(
        name for name in used if name not in bound or _required(config[name, "gin.macro"]["value"])
    )
    if missing:
        examples = " ".join(f"--gin.{name}=\"'…'\"" for name in missing)
        raise UsageError(f"{', '.join(missing)} must be given: add {examples}")


def _required(value: object) -> bool:
    return getattr(value, "scoped_selector", None) == "gin.REQUIRED/gin.constant"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] or type(error).__name__
