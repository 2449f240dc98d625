"""The student of a training run before its first step: architecture, contract, vocabulary, parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from inranker_jax.checkpoints import LoadedModel, load_model, native
from inranker_jax.corpora.shipped import find_shipped
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config
from inranker_jax.progress import announce
from inranker_jax.prompts import ScoringContract, Tokenizer, preset

RANDOM = "random initialisation"


@dataclasses.dataclass(frozen=True)
class Student:
    """The student before the first step.

    Attributes:
      config: its architecture.
      contract: how a pair becomes token ids and a score.
      tokenizer: its vocabulary.
      make_params: returns its parameters at step 0, on the host or traceable.
      source: where they come from, in words.
      first_step: where counting starts: the step of a T5X checkpoint, 0 of everything else.
    """

    config: T5Config
    contract: ScoringContract
    tokenizer: Tokenizer
    make_params: Callable[[], Any]
    source: str
    first_step: int = 0


def choose_student(
    initial_checkpoint: str | None,
    model: T5Config | None,
    initialiser: Callable[[T5Config, int], Any],
    seed: int,
    vocabulary: str | None,
    contract: ScoringContract | None,
    dropout_rate: float | None,
    task_feature_lengths: Mapping[str, int] | None = None,
) -> Student:
    """Settles the student. A checkpoint's architecture and vocabulary win over what is bound in gin.

    The contract is the bound one, else the checkpoint's, else monoT5's; `task_feature_lengths["inputs"]` is its
    `max_length`.

    Raises:
      InputError: something is missing, or vocabulary and model do not fit together.
    """
    loaded: LoadedModel | None = load_model(initial_checkpoint, on_host=True) if initial_checkpoint else None
    config = loaded.config if loaded else model
    if config is None:
        raise InputError("no student: bind train.model (gin/models/*.gin) or give --init_checkpoint.")
    tokenizer = loaded.tokenizer if loaded else None
    if tokenizer is None:
        if not vocabulary:
            raise InputError(
                "no vocabulary: bind VOCABULARY to a folder with spiece.model or tokenizer.json"
                + (f"; {initial_checkpoint} has no tokenizer files." if loaded else ".")
            )
        tokenizer = Tokenizer.from_pretrained(find_shipped(vocabulary))
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the vocabulary has {tokenizer.vocab_size} pieces but the model only {config.vocab_size} rows. "
            "Use the model's own vocabulary, or raise models.T5Config.vocab_size."
        )
    if dropout_rate is not None:
        config = dataclasses.replace(config, dropout_rate=dropout_rate)
    stored = loaded.contract if loaded else None
    if contract and stored and contract != stored:
        announce(f"contract: {contract.name} as bound in gin, not the {stored.name} of {initial_checkpoint}")
    contract = with_lengths(contract or stored or preset("monot5"), task_feature_lengths)
    if loaded is None:
        return Student(config, contract, tokenizer, functools.partial(initialiser, config, seed), RANDOM)
    return Student(config, contract, tokenizer, lambda: loaded.params, loaded.source, loaded.step or 0)


def with_lengths(
    contract: ScoringContract, task_feature_lengths: Mapping[str, int] | None
) -> ScoringContract:
    """The contract with T5X's TASK_FEATURE_LENGTHS: "inputs" tokens a pair. "targets" says nothing here."""
    if task_feature_lengths is None:
        return contract
    if "inputs" not in task_feature_lengths or set(task_feature_lengths) - {"inputs", "targets"}:
        raise InputError(
            f"TASK_FEATURE_LENGTHS is {dict(task_feature_lengths)}. Expected {{'inputs': TOKENS}}, with or without "
            "'targets'; the decoder has one position here."
        )
    return contract.replace(max_length=task_feature_lengths["inputs"])


def check_steps(total_steps: int, student: Student, first_step: int) -> None:
    """Raises InputError where T5X's way of counting leaves nothing to train."""
    if first_step and total_steps <= first_step:
        raise InputError(
            f"TRAIN_STEPS is {total_steps}, and {student.source} is at step {first_step}. As in T5X, TRAIN_STEPS "
            f"includes the steps of the checkpoint: {total_steps} more are TRAIN_STEPS = {first_step + total_steps}. "
            "To count from 0 instead: --gin.train.first_step=0."
        )


def resumed_student(model_dir: str) -> Student | None:
    """The student of a run that has a checkpoint; its initial parameters are not needed any more."""
    parts = native.describe(model_dir)
    if parts is None:
        return None
    description, tokenizer = parts
    return Student(description.config, description.contract, tokenizer, lambda: None, model_dir)
