"""Command lines and gin files of the binaries: T5X's conventions.

`--gin_file=FILE` (repeatable), `--gin.NAME=VALUE` for single bindings, `--gin_search_paths=A,B`. A gin file is
looked for as given, below the search paths, and among the files shipped with the package, so
`--gin_file=gin/small_synth.gin` works from any folder. No other module imports gin, so a loss or a model stays
a plain function; they get their gin names here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import shlex
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

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
      InputError: there is no such file; the message suggests one, or lists those of its folder.
    """
    for folder in _places(search_paths):
        path = name if paths.is_remote(name) else os.path.join(folder, name)
        if _is_file(path):
            return path
    raise InputError(f"no gin file {name!r}.{_similar_files(name, search_paths)}")


def _places(search_paths: Sequence[str]) -> list[str]:
    shipped = shipped_gin_folder()
    return ["", *search_paths, str(shipped.parent), str(shipped)]


def _similar_files(name: str, search_paths: Sequence[str]) -> str:
    """The gin file that was meant, else a list of those in its folder, else of all that are shipped."""
    folder, base = os.path.split(name)
    local = [place for place in _places(search_paths) if not paths.is_remote(os.path.join(place, folder))]
    beside = sorted(
        {
            os.path.join(folder, path.name)
            for place in local
            for path in pathlib.Path(place, folder).glob("*.gin")
        }
    )
    root = shipped_gin_folder()
    shipped = sorted(f"gin/{path.relative_to(root).as_posix()}" for path in root.rglob("*.gin"))
    # Folders and suffixes are the same in all, so only the files' own names are compared.
    stems = {os.path.basename(path).removesuffix(".gin"): path for path in [*shipped, *beside]}
    close = difflib.get_close_matches(base.removesuffix(".gin"), stems, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {stems[close[0]]!r}?"
    if beside and folder not in ("", "gin"):
        return f" Gin files in {folder}: {', '.join(os.path.basename(path) for path in beside)}."
    return (
        f" Shipped files: {', '.join(shipped)}. Files of your own are looked for in --gin_search_paths too."
    )


def _is_file(path: str) -> bool:
    return paths.of(path).is_file() if paths.is_remote(path) else os.path.isfile(path)


def _read(path: str) -> str:
    try:
        return pathlib.Path(paths.local_copy(path)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError.at(path, None, "not text in UTF-8", "a gin file") from error
    except OSError as error:
        raise InputError.at(
            path, None, error.strerror or str(error), "a gin file that may be read"
        ) from error


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
    sources = _Sources(search_paths)
    for name in files:
        sources.add_file(find_gin_file(name, search_paths), name)
    given = [f"{name} = {value!r}" for name, value in (macros or {}).items() if value is not None]
    _check_macros([*given, *bindings], sources)
    for binding in [*given, *bindings]:
        sources.add_binding(binding)
    # gin reads what was read here. Its own readers take a folder `runs/` of the user's for a package, and fail on it.
    gin.config._LOCATION_PREFIXES[:] = [""]
    gin.config._FILE_READERS[:] = [(sources.open, sources.found.__contains__)]
    place = ""
    try:
        gin.parse_config_files_and_bindings(files, [], finalize_config=False)
        for binding in [*given, *bindings]:
            place = f"--gin.{binding}"
            gin.parse_config(binding)
    except (ValueError, TypeError, LookupError, ImportError) as error:
        raise InputError(_explain(error, place)) from error
    _check_meanings(sources)
    _check_use(sources)
    _check_required()


class _Text(io.StringIO):
    """A gin file's text; gin's messages name the file by `name`."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(text)
        self.name = path


@dataclasses.dataclass
class _Sources:
    """Gin files, with all that they include, and bindings: read once, before gin binds anything.

    Attributes:
      search_paths: see `find_gin_file`.
      found: a file's name as given or included -> its path.
      texts: path -> text.
      defined: macro, with its scopes -> the `file:line` that defines it first.
      referred: macros that a file or a binding refers to, as %NAME.
    """

    search_paths: Sequence[str] = ()
    found: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    defined: dict[str, str] = dataclasses.field(default_factory=dict)
    referred: set[str] = dataclasses.field(default_factory=set)

    def add_file(self, path: str, name: str, within: tuple[str, ...] = ()) -> None:
        """Reads a file and all that it includes.

        Raises:
          InputError: naming file and line, for what cannot be read, is not there, or includes itself.
        """
        self.found[name] = path
        self.texts[path] = text = _read(path)
        try:
            for statement in self._statements(_Text(path, text)):
                place = f"{path}:{statement.location.line_num}"
                if macro := _macro_of(statement):
                    self.defined.setdefault(macro, place)
                if hasattr(statement, "filename"):
                    self._include(statement.filename, place, (*within, path))
        except (SyntaxError, tokenize.TokenError) as error:
            raise _unreadable(path, error) from error

    def _include(self, name: str, place: str, within: tuple[str, ...]) -> None:
        try:
            path = find_gin_file(name, self.search_paths)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if path in within:
            raise InputError(f"{place}: {name!r} includes itself. Take one of the includes out.")
        self.add_file(path, name, within)

    def add_binding(self, binding: str) -> None:
        """Reads one binding of the command line.

        Raises:
          InputError: naming the binding, when it cannot be read.
        """
        try:
            list(self._statements(io.StringIO(binding)))
        except (SyntaxError, tokenize.TokenError) as error:
            raise _unreadable_binding(binding) from error

    def _statements(self, source: io.StringIO) -> Iterator[Any]:
        yield from gin.config.config_parser.ConfigParser(source, self)

    def open(self, name: str) -> _Text:
        """For gin: the file of that name."""
        return _Text(self.found[name], self.texts[self.found[name]])

    def macro(self, name: str) -> None:
        """For gin's parser: %NAME. A scoped %a/b takes what is bound to `a` where `a/b` has nothing."""
        parts = name.split("/")
        self.referred.update("/".join(parts[:length]) for length in range(1, len(parts) + 1))

    def configurable_reference(self, name: str, evaluate: bool) -> None:
        """For gin's parser: @NAME, which with @NAME/macro() is another way to write %NAME."""
        scope, _, selector = name.rpartition("/")
        if selector in ("macro", "gin.macro"):
            self.macro(scope)


def _macro_of(statement: Any) -> str | None:
    """The macro that a statement of a gin file defines: NAME, scope/NAME, or None."""
    if not hasattr(statement, "arg_name"):
        return None
    scope, selector = statement.scope, statement.selector
    if not statement.arg_name:
        return f"{scope}/{selector}" if scope else selector
    return scope if selector in ("macro", "gin.macro") else None


_VALUES = (
    "a Python literal (a number, True, False, None, a quoted string, or a list, tuple or dict of these), "
    "@FUNCTION or %MACRO"
)


def _unreadable(path: str, error: SyntaxError | tokenize.TokenError) -> InputError:
    """The error for a gin file that cannot be parsed."""
    if not isinstance(error, SyntaxError):
        return InputError.at(path, None, "a bracket or a string is not closed at the end of the file")
    token = re.search(r"Failed to parse token '(.*)'", error.msg, re.DOTALL)
    if token:
        problem, remedy = _not_a_value(token[1], json.dumps(token[1], ensure_ascii=False))
        return InputError.at(path, error.lineno, problem, _VALUES, remedy)
    expected = _VALUES if "parse value" in error.msg else "NAME = VALUE, with brackets around several lines"
    problem = f"{error.msg.strip().rstrip('.')}: {(error.text or '').strip()}"
    return InputError.at(path, error.lineno, problem, expected)


def _unreadable_binding(binding: str) -> InputError:
    """The error for a binding of the command line that cannot be parsed."""
    name, _, value = (part.strip() for part in binding.partition("="))
    if not re.fullmatch(r"[\w./]+", name):
        expected = "--gin.NAME=VALUE, where NAME is a macro or FUNCTION.ARGUMENT"
        return InputError.at(f"--gin.{binding}", None, f"{name!r} is not a name", expected)
    quoted = shlex.quote(json.dumps(value, ensure_ascii=False))
    problem, remedy = _not_a_value(value, f"--gin.{name}={quoted}")
    return InputError.at(f"--gin.{binding}", None, problem, _VALUES, remedy.replace("quotes", "inner quotes"))


def _not_a_value(value: str, quoted: str) -> tuple[str, str]:
    """What is wrong with a value, and what to write in its place."""
    problem = f"{value or 'nothing'} is not a value"
    constant = did_you_mean(value, ("True", "False", "None")).strip()
    if constant or not re.fullmatch(r"[A-Za-z_/.~][^()@%'\"\[\]{}]*", value):
        return problem, constant
    return problem, f"A string needs quotes: {quoted}"


def _check_macros(bindings: Sequence[str], sources: _Sources) -> None:
    """Raises InputError for a binding of a macro that no file has: gin itself would take it and use it nowhere."""
    known = sources.defined
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


def _check_use(sources: _Sources) -> None:
    """Raises InputError for a macro of a file to which nothing refers, such as a misspelt one.

    Macros of the shipped files may stand anywhere: which of them are in use depends on the mesh and the like.
    """
    idle = [name for name in sources.defined if name not in sources.referred]
    if not idle:
        return
    shipped = _Sources()
    for path in shipped_gin_folder().rglob("*.gin"):
        shipped.add_file(str(path), str(path))
    for name in idle:
        if name not in shipped.defined:
            used = sorted(sources.referred & {*sources.defined, *shipped.defined})
            raise InputError(
                f"{sources.defined[name]}: nothing refers to the macro {name}, so it sets nothing."
                f"{did_you_mean(name, used)} Correct the name, take the line out, or refer to it: "
                f"FUNCTION.ARGUMENT = %{name}. Macros in use: {', '.join(used) or 'none'}."
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


def _check_meanings(sources: _Sources) -> None:
    """Raises InputError for a macro of T5X that a gin file sets and that would do nothing here."""
    for name, place in sources.defined.items():
        if name in _WITHOUT_MEANING:
            raise InputError(
                f"{place}: {name} is T5X's and does nothing here: {_WITHOUT_MEANING[name]}. Take the line out."
            )


def _explain(error: Exception, place: str) -> str:
    """What gin refused, at `place` or in the file that gin names, and what may have been meant."""
    text = str(error)
    where = re.search(r'\n  In file "(.*)", line (\d+)\n', text)
    problem = re.split(r"\n  In (?:file|bindings string)", text)[0].strip().strip('"')
    unknown = re.search(r"No configurable matching (?:reference )?['\"]@?([^'\"()]+)", problem)
    hint = did_you_mean(unknown[1], [*CONFIGURABLES, "train"]) if unknown else ""
    if parameter := re.search(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", problem):
        options = sorted(inspect.signature(gin.config._REGISTRY.get_match(parameter[1]).wrapped).parameters)
        hint = did_you_mean(parameter[2], options) or f" Parameters: {', '.join(options)}."
    return f"{place or (f'{where[1]}:{where[2]}' if where else 'gin')}: {problem}{hint}"


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
