"""Command lines and gin files of the binaries: T5X's conventions.

`--gin_file=FILE` (repeatable), `--gin.NAME=VALUE` for single bindings, `--gin_search_paths=A,B`. A gin file is
looked for as given, below the search paths, and among the files shipped with the package, so
`--gin_file=gin/small_synth.gin` works from any folder. No other module imports gin, so a loss or a model stays
a plain function; they get their gin names here.
"""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import gin

from inranker_jax.errors import InputError, did_you_mean

_PACKAGE = pathlib.Path(__file__).resolve().parent

# gin name -> where the object lives. Import cost is paid only by the binaries that parse gin.
CONFIGURABLES: dict[str, str] = {
    "losses.normalized_logit_mse": "inranker_jax.losses",
    "losses.true_logit_mse": "inranker_jax.losses",
    "losses.kl_divergence": "inranker_jax.losses",
    "losses.hard_cross_entropy": "inranker_jax.losses",
    "losses.weighted_sum": "inranker_jax.losses",
    "models.T5Config": "inranker_jax.models",
    "models.Compute": "inranker_jax.models",
    "optimizers.adamw": "inranker_jax.optimizers",
    "optimizers.adafactor": "inranker_jax.optimizers",
    "optimizers.warmup_linear_decay": "inranker_jax.optimizers",
    "optimizers.inverse_square_root": "inranker_jax.optimizers",
    "optimizers.constant": "inranker_jax.optimizers",
    "partitioning.make_mesh": "inranker_jax.partitioning",
    "prompts.preset": "inranker_jax.prompts",
    "prompts.ScoringContract": "inranker_jax.prompts",
}


def shipped_gin_folder() -> pathlib.Path:
    """The folder of the shipped gin files: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "gin"
    return installed if installed.is_dir() else _PACKAGE.parent / "gin"


def find_gin_file(name: str, search_paths: Sequence[str] = ()) -> str:
    """Finds a gin file by path, below the search paths, or among the shipped files.

    Raises:
      InputError: there is no such file; the message lists the shipped ones.
    """
    shipped = shipped_gin_folder()
    for folder in [pathlib.Path("."), *map(pathlib.Path, search_paths), shipped.parent, shipped]:
        if (folder / name).is_file():
            return str(folder / name)
    known = sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.gin"))
    hint = did_you_mean(name.removeprefix("gin/"), known)
    raise InputError(f"no gin file {name!r}.{hint} Shipped files, as gin/NAME: {', '.join(known)}.")


def split_gin_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates T5X-style `--gin.NAME=VALUE` flags from the rest.

    >>> split_gin_flags(["--gin.TRAIN_STEPS=10", "--output_dir=x"])
    (['TRAIN_STEPS=10'], ['--output_dir=x'])
    """
    bindings, rest = [], []
    for argument in argv:
        if argument.startswith("--gin."):
            if "=" not in argument:
                raise InputError(f"{argument}: expected --gin.NAME=VALUE, with string values in inner quotes.")
            bindings.append(argument.removeprefix("--gin."))
        else:
            rest.append(argument)
    return bindings, rest


def _register() -> None:
    for name, home in CONFIGURABLES.items():
        module, function = name.split(".")
        try:
            gin.get_configurable(name)
        except ValueError:
            gin.external_configurable(getattr(importlib.import_module(home), function), function, module=module)


def parse_gin(files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> None:
    """Parses gin files, then bindings, which win; misspelt names are errors.

    Raises:
      InputError: a file is missing, or a file or a binding does not parse.
    """
    _register()
    gin.clear_config()
    for folder in [*search_paths, str(shipped_gin_folder().parent), str(shipped_gin_folder())]:
        gin.add_config_file_search_path(folder)
    paths = [find_gin_file(name, search_paths) for name in files]
    try:
        gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
    except (ValueError, SyntaxError, OSError, TypeError) as error:
        raise InputError(_explain(error, bindings)) from error


def _explain(error: Exception, bindings: Sequence[str]) -> str:
    text = str(error).strip()
    unknown = re.search(r"No configurable matching ['\"]([^'\"]+)['\"]", text)
    hint = did_you_mean(unknown[1], CONFIGURABLES) if unknown else ""
    quotes = ""
    if any(re.fullmatch(r"[^=]+=[A-Za-z_/][^()@%]*", binding) for binding in bindings):
        quotes = ' A string on the command line needs inner quotes: --gin.NAME=\\"value\\".'
    return f"gin: {text}{hint}{quotes}"


def bind_macro(name: str, value: Any) -> None:
    """Sets a gin macro such as `MODEL_DIR` from a command-line flag, over whatever the files say."""
    gin.bind_parameter(f"{name}/macro.value", value)


def check_required() -> None:
    """Raises InputError when a macro is still `gin.REQUIRED` after files and flags, and names it."""
    missing = [
        name.removesuffix("/gin.macro")
        for (name, _), parameters in gin.config._CONFIG.items()
        if parameters.get("value") is gin.REQUIRED
    ]
    if missing:
        raise InputError(
            f"required gin values are not set: {', '.join(sorted(missing))}. "
            f"Set them in a gin file or as --gin.{sorted(missing)[0]}=VALUE."
        )


def effective_config() -> str:
    """The gin configuration in force, as text which can be parsed again."""
    return gin.config_str(max_line_length=110)
