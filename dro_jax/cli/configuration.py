"""Gin for the command line: finds the files, reads them, and refuses what nothing uses."""

import difflib
import functools
import logging
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import gin
from etils import epath

import dro_jax
from dro_jax.errors import UsageError
from dro_jax.whole_files import write_whole

T = TypeVar("T")

_PACKAGE = Path(dro_jax.__file__).parent
_flags: list[str] = []
"""What the command line bound, as it was written."""


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
    # A macro has done its work when a later binding takes the place of the one that used it.
    used: set[str] = set()
    for path in gin_files:
        _parse(path, functools.partial(gin.parse_config_file, path))
        used |= _used_macros()
    _flags.clear()
    for binding in bindings:
        flag = f"--gin.{binding.replace(' = ', '=')}"
        _parse(flag, functools.partial(gin.parse_config, binding))
        _flags.append(flag)
    _check_macros(used)
    _parse("gin configuration", gin.finalize)


def bound(function: Callable[..., T]) -> Callable[..., T]:
    """The function as the loaded configuration binds its arguments.

    Raises:
      UsageError: if an argument cannot be made from its binding, or a flag set nothing.
    """
    arguments(function)
    _check_flags(function)
    return cast(Callable[..., T], gin.get_configurable(function))


def arguments(function: Callable[..., object]) -> dict[str, Any]:
    """What the loaded configuration binds a function's arguments to, made. Raises as `bound`."""
    return cast(
        dict[str, Any], _parse("gin configuration", functools.partial(gin.get_bindings, function))
    )


def text() -> str:
    """The loaded configuration, whole, as a gin file."""
    return cast(str, gin.config_str())


def save_operative(path: epath.PathLike) -> None:
    """Writes the configuration that was really used, as a gin file."""
    # Gin writes what a macro made under the macro's name, which a flag without it would not replace.
    macros = "|".join(sorted(_bound_macros()))
    text = re.sub(
        rf"^(# Parameters for )?(?:{macros})/", r"\1", gin.operative_config_str(), flags=re.M
    )
    write_whole(path, text)


def _parse(what: str, parse: Callable[[], T]) -> T:
    # Gin logs an error for every search path in which a file is not.
    logging.disable(logging.ERROR)
    try:
        return parse()
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


def _check_flags(function: Callable[..., object]) -> None:
    """Gin accepts flags for classes that this run does not make, and lets a scoped binding go before them."""
    config, used = gin.config._CONFIG, gin.config._OPERATIVE_CONFIG
    own = gin.get_configurable(function)
    for flag in _flags:
        name = flag.removeprefix("--gin.").partition("=")[0]
        if "." not in name:
            continue
        key = gin.config.ParsedBindingKey.parse(name)
        if gin.config._REGISTRY[key.complete_selector].wrapper is own:
            continue
        given = config[key.scope, key.complete_selector][key.arg_name]
        values = [
            values[key.arg_name]
            for (_, selector), values in used.items()
            if selector == key.complete_selector and key.arg_name in values
        ]
        if not values:
            raise UsageError(
                f"{flag}: this run makes no {key.given_selector}, so that it sets nothing"
            )
        if given not in values:
            raise UsageError(
                f"{flag}: sets nothing, as a gin file binds {key.given_selector}.{key.arg_name} in a scope"
            )


def _bound_macros() -> set[str]:
    # Gin has no public view of its bindings.
    return {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}


def _used_macros() -> set[str]:
    references = gin.config.iterate_references(gin.config._CONFIG)
    parts = (reference.scoped_selector.rpartition("/") for reference in references)
    return {name for name, _, selector in parts if selector == "gin.macro"}


def _check_macros(used_before: set[str]) -> None:
    """Gin accepts a misspelt macro silently: it would be a setting that sets nothing."""
    config, bound, used = gin.config._CONFIG, _bound_macros(), _used_macros()
    for name in sorted(bound - used - used_before):
        known = sorted(used)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
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
