"""Command lines and gin files of the binaries: T5X's conventions.

`--gin_file=FILE` (repeatable), `--gin.NAME=VALUE` for single bindings, `--gin_search_paths=A,B`. A gin file is
looked for as given, below the search paths, and among the files shipped with the package, so
`--gin_file=gin/small_synth.gin` works from any folder. No other module imports gin, so a loss or a model stays
a plain function; they get their gin names here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any

from inranker_jax import paths
from inranker_jax.errors import InputError, did_you_mean

try:
    import gin
except ModuleNotFoundError as missing:
    print(
        f"error: this command needs the package {missing.name!r}. Run `pip install '.[train]'` in the checkout, or "
        "`pip install 'inranker_jax[train]'`; '[eval]' is enough to evaluate.",
        file=sys.stderr,
    )
    raise SystemExit(2) from missing

_PACKAGE = pathlib.Path(__file__).resolve().parent

# gin name -> where the object lives. Import cost is paid only by the binaries that parse gin.
CONFIGURABLES: dict[str, str] = {
    "losses.normalized_logit_mse": "inranker_jax.losses",
    "losses.true_logit_mse": "inranker_jax.losses",
    "losses.kl_divergence": "inranker_jax.losses",
    "losses.listwise_kl_divergence": "inranker_jax.losses",
    "losses.hard_cross_entropy": "inranker_jax.losses",
    "losses.weighted_sum": "inranker_jax.losses",
    "models.T5Config": "inranker_jax.models",
    "models.Compute": "inranker_jax.models",
    "initialisers.mimetic": "inranker_jax.models.initialisers",
    "evaluation.report_student": "inranker_jax.evaluation.student_report",
    "optimizers.adamw": "inranker_jax.optimizers",
    "optimizers.adafactor": "inranker_jax.optimizers",
    "optimizers.warmup_linear_decay": "inranker_jax.optimizers",
    "optimizers.inverse_square_root": "inranker_jax.optimizers",
    "optimizers.constant": "inranker_jax.optimizers",
    "evaluation.Settings": "inranker_jax.evaluation.pipeline",
    "evaluation.load_reranker": "inranker_jax.evaluation.loading",
    "packing.Layout": "inranker_jax.packing",
    "partitioning.make_mesh": "inranker_jax.partitioning",
    "partitioning.single_device_mesh": "inranker_jax.partitioning",
    "prompts.preset": "inranker_jax.prompts",
    "rates.equal": "inranker_jax.data.rates",
    "rates.temperature": "inranker_jax.data.rates",
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
    for folder in ["", *search_paths, str(shipped.parent), str(shipped)]:
        path = name if paths.is_remote(name) else os.path.join(folder, name)
        if _is_file(path):
            return path
    known = sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.gin"))
    hint = did_you_mean(name.removeprefix("gin/"), known)
    raise InputError(f"no gin file {name!r}.{hint} Shipped files, as gin/NAME: {', '.join(known)}.")


def _is_file(path: str) -> bool:
    return paths.of(path).is_file() if paths.is_remote(path) else os.path.isfile(path)


def _open(path: str) -> IO[str]:
    return open(paths.local_copy(path), encoding="utf-8")


def split_gin_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates T5X-style `--gin.NAME=VALUE` flags from the rest.

    >>> split_gin_flags(["--gin.TRAIN_STEPS=10", "--output_dir=x"])
    (['TRAIN_STEPS=10'], ['--output_dir=x'])
    """
    bindings, rest = [], []
    for argument in argv:
        if argument.startswith("--gin."):
            if "=" not in argument:
                raise InputError(
                    f"{argument}: expected --gin.NAME=VALUE, with string values in inner quotes."
                )
            bindings.append(argument.removeprefix("--gin."))
        else:
            rest.append(argument)
    return bindings, rest


def _register(names: Collection[str]) -> None:
    for name in names:
        home = CONFIGURABLES[name]
        module, function = name.split(".")
        try:
            gin.get_configurable(name)
        except ValueError:
            gin.external_configurable(
                getattr(importlib.import_module(home), function), function, module=module
            )


def add_gin_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--gin_file` and `--gin_search_paths`; `--gin.NAME=VALUE` is split off before (`split_gin_flags`)."""
    parser.add_argument(
        "--gin_file", action="append", default=[], help="gin file; may be given more than once"
    )
    parser.add_argument(
        "--gin_search_paths",
        type=lambda text: [part for part in text.split(",") if part],
        default=[],
        help="comma-separated folders in which gin files and their includes are looked for",
    )
    parser.epilog = "--gin.NAME=VALUE sets a single gin value; strings need inner quotes: --gin.NAME='\"x\"'."


def parse_gin(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    macros: Mapping[str, Any] | None = None,
    names: Collection[str] = tuple(CONFIGURABLES),
) -> None:
    """Parses gin files, then `macros` that are not None, then bindings; the later wins.

    Args:
      files: gin files, see `find_gin_file`.
      bindings: single bindings, as after `--gin.`.
      search_paths: folders in which files and their includes are looked for.
      macros: macros that flags set.
      names: of `CONFIGURABLES`, those that may be bound; only these are imported.

    Raises:
      InputError: a file is missing, a file or a binding does not parse, or a required value is not set.
    """
    _register(names)
    gin.clear_config()
    for folder in [*search_paths, str(shipped_gin_folder().parent), str(shipped_gin_folder())]:
        gin.add_config_file_search_path(folder)
    found = [find_gin_file(name, search_paths) for name in files]
    try:
        given = [f"{name} = {value!r}" for name, value in (macros or {}).items() if value is not None]
        # Plain files only: gin's other reader takes a folder `runs/` of the user's for a package, and fails on it.
        gin.config._FILE_READERS[:] = [(_open, _is_file)]
        gin.parse_config_files_and_bindings(found, [], finalize_config=False)
        _check_macros([*given, *bindings])
        gin.parse_config([*given, *bindings])
        _check_meanings()
    except (ValueError, SyntaxError, OSError, TypeError) as error:
        raise InputError(_explain(error, bindings)) from error
    _check_required()


def _check_macros(bindings: Sequence[str]) -> None:
    """Raises InputError for a binding of a macro that no file has: gin itself would take it and use it nowhere."""
    known = [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if re.fullmatch(r"\w+", name) and name not in known:
            why = (
                f" In T5X it has a meaning, but {_WITHOUT_MEANING[name]}." if name in _WITHOUT_MEANING else ""
            )
            raise InputError(
                f"--gin.{name}: no gin file has a macro of that name.{why}{did_you_mean(name, known)} "
                f"Macros: {', '.join(sorted(known)) or 'none'}. Other values are set as --gin.FUNCTION.ARGUMENT=VALUE."
            )


# T5X's macros for which there is nothing here, and why.
_WITHOUT_MEANING = {
    "LOSS_NORMALIZING_FACTOR": "losses here are means over the entries of a batch's lists",
    "LABEL_SMOOTHING": "the targets are the teacher's logits",
    "Z_LOSS": "the targets are the teacher's logits",
    "USE_HARDWARE_RNG": "dropout is the same on every device and mesh",
    "SHUFFLE_TRAIN_EXAMPLES": "the data is always shuffled, by RANDOM_SEED",
    "EVALUATOR_USE_MEMORY_CACHE": "evaluation is `python -m inranker_jax.evaluate`",
    "EVALUATOR_NUM_EXAMPLES": "evaluation is `python -m inranker_jax.evaluate`",
    "JSON_WRITE_N_RESULTS": "evaluation is `python -m inranker_jax.evaluate`",
}


def _check_meanings() -> None:
    """Raises InputError for a macro of T5X that a gin file sets and that would do nothing here."""
    for scope, selector in gin.config._CONFIG:
        if selector == "gin.macro" and scope in _WITHOUT_MEANING:
            raise InputError(
                f"{scope} is T5X's and does nothing here: {_WITHOUT_MEANING[scope]}. Take the line out."
            )


def _explain(error: Exception, bindings: Sequence[str]) -> str:
    text = str(error).strip()
    unknown = re.search(r"No configurable matching (?:reference )?['\"]@?([^'\"()]+)", text)
    hint = did_you_mean(unknown[1], CONFIGURABLES) if unknown else ""
    quotes = ""
    if any(re.fullmatch(r"[^=]+=[A-Za-z_/][^()@%]*", binding) for binding in bindings):
        quotes = ' A string on the command line needs inner quotes: --gin.NAME=\\"value\\".'
    return f"gin: {text}{hint}{quotes}"


def _check_required() -> None:
    """Raises InputError naming every macro that is still `%gin.REQUIRED` after files and flags."""
    missing = sorted(
        name
        for (name, selector), parameters in gin.config._CONFIG.items()
        if selector == "gin.macro" and repr(parameters.get("value")) == "%gin.REQUIRED"
    )
    if missing:
        flags = {"MODEL_DIR": "--output_dir=DIR", "INITIAL_CHECKPOINT_PATH": "--init_checkpoint=DIR"}
        remedies = ", ".join(flags.get(name, f"--gin.{name}=VALUE") for name in missing)
        raise InputError(
            f"required gin values are not set: {', '.join(missing)}. Set them in a gin file, or: {remedies}."
        )


# Bindings that may change between the sessions of one run: they decide neither the data nor, up to rounding, a step.
_FREE = {
    "train": {
        "model_dir", "total_steps", "mesh", "log_every", "final_report", "keep_latest", "keep_best",
        "validation_split", "validation_batches", "validation_period", "checkpoint_period", "vocabulary",
        "mixture_or_task_module", "use_cached", "seqio_cache_dirs", "profile_steps", "wandb_project", "hang_seconds",
        "hang_factor", "hang_exit_seconds", "accumulation",
    },
    "Compute": {"remat", "scan"},
    "Layout": {"tokens_per_call"},
    "gin.macro": {
        "MODEL_DIR", "TRAIN_STEPS", "VOCABULARY", "MIXTURE_OR_TASK_MODULE", "USE_CACHED_TASKS", "EVAL_PERIOD",
        "EVAL_STEPS", "FSDP", "TENSOR", "SLICES", "REMAT",
    },
}  # fmt: skip
_FREE_ROOMS = ("evaluation", "partitioning")


def deciding_bindings() -> dict[str, str]:
    """The gin bindings that decide what a training run computes, as text: name -> value."""
    found = {}
    for (scope, selector), parameters in gin.config._CONFIG.items():
        short = selector if selector == "gin.macro" else ".".join(selector.split(".")[-2:])
        room, name = short.split(".")[0], short.split(".")[-1]
        if room in _FREE_ROOMS:
            continue
        free = _FREE.get("gin.macro" if short == "gin.macro" else name, set())
        for parameter, value in parameters.items():
            key = scope if short == "gin.macro" else f"{short}.{parameter}"
            if (scope if short == "gin.macro" else parameter) not in free:
                found[key] = repr(value)
    return dict(sorted(found.items()))


def message_of(error: BaseException) -> str:
    """The error's message without gin's note of which configurable it came through."""
    return str(error).split("\n  In call to configurable")[0]


def effective_config() -> str:
    """The gin configuration in force, as text which can be parsed again."""
    return gin.config_str(max_line_length=110)
