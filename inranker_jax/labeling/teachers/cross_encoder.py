"""Hugging Face sequence-classification cross-encoders as teachers (BGE, MiniLM, Electra, ModernBERT, ...)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers import torch_calls
from inranker_jax.labeling.teachers.base import (
    Chunk,
    check_finite,
    folder_digest,
    model_folder,
    optional_package,
    split_margin,
    strip_pair,
)
from inranker_jax.labeling.teachers.spec import TeacherSpec

# Position tables of the RoBERTa family begin after the padding id.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer")
_HUGE = 1_000_000  # tokenizers without a limit of their own state 1e30


class CrossEncoderTeacher(torch_calls.TorchTeacher):
    """A model of `AutoModelForSequenceClassification` that reads query and document together.

    One output m becomes (-m/2, +m/2); of several outputs, two are taken as they are: 0 as the false and 1 as
    the true logit of a pair of outputs, `false=I&true=J` of more. Outputs are raw: no sigmoid or softmax.

    Args:
      spec: options `dtype`, `max_length`, `tokens_per_call`, `device`, `false`, `true`.

    Raises:
      InputError: a package is missing, there is no such model, it has no trained classification head, or its
        number of outputs does not fit the options.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        torch = torch_calls.load_torch()
        transformers = optional_package("transformers")
        options = spec.options
        folder = model_folder(spec.path)
        super().__init__(spec, torch, transformers)
        self._dtype = options.get("dtype", "float32")
        self._tokenizer, self._model = _load(transformers, folder, getattr(torch, self._dtype), spec.path)
        self._model.eval().to(self._device)
        self._outputs = _outputs(self._model.config.num_labels, options, spec.path)
        limit = _longest(self._tokenizer, self._model.config)
        self._max_length = options.get("max_length", limit)
        if self._max_length > limit:
            raise InputError(
                f"teacher {spec.path}: max_length={self._max_length}, but the model reads {limit} tokens."
            )
        self._identity = {
            "kind": "cross-encoder",
            "files": folder_digest(folder),
            "dtype": self._dtype,
            "max_length": self._max_length,
            "outputs": list(self._outputs),
        }
        self._runner = torch_calls.Runner(self._device, self._tokens)

    def logits(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """See `Teacher`. On a CPU, a pair's values do not even depend on the rest of its chunk."""
        waiting: Callable[[], np.ndarray] | None = None
        for chunk in chunks:
            dispatched = self._dispatch(chunk)
            if waiting is not None:
                yield waiting()
            waiting = dispatched
        if waiting is not None:
            yield waiting()

    def _dispatch(self, chunk: Chunk) -> Callable[[], np.ndarray]:
        """Starts a chunk's calls (CUDA runs them while the next chunk is tokenised)."""
        texts = [strip_pair(pair) for pair in chunk]
        calls: list[tuple[torch_calls.Call, Any]] = []
        if texts:
            encoded = self._tokenizer(
                [query for query, _ in texts],
                [document for _, document in texts],
                truncation="longest_first",
                max_length=self._max_length,
                return_attention_mask=True,
            )
            lengths = [len(ids) for ids in encoded["input_ids"]]
            names = [name for name in self._tokenizer.model_input_names if name in encoded]

            def compute(call: torch_calls.Call) -> Any:
                rows = {name: [encoded[name][row] for row in call.rows] for name in names}
                batch = self._tokenizer.pad(
                    rows, padding="max_length", max_length=call.length, return_tensors="pt"
                )
                inputs = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
                return self._model(**inputs).logits

            calls = self._runner.run(compute, torch_calls.plan(lengths, self._max_length, self._tokens))

        def wait() -> np.ndarray:
            values = np.zeros((len(texts), self._model.config.num_labels), np.float32)
            for call, outputs in calls:
                values[call.rows[: call.count]] = outputs[: call.count].float().cpu().numpy()
            picked = values[:, list(self._outputs)]
            return check_finite(
                split_margin(picked[:, 0]) if len(self._outputs) == 1 else picked, chunk, self.name
            )

        return wait


def _load(transformers: Any, folder: pathlib.Path, dtype: Any, source: str) -> tuple[Any, Any]:
    with torch_calls.quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{source}: transformers cannot load it as a sequence-classification cross-encoder "
                f"({str(error).splitlines()[0]}). Expected config.json, weights and tokenizer files of one."
            ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise InputError(
            f"{source}: its weights lack {missing}, which transformers would fill with random numbers. "
            "Expected a cross-encoder with a trained classification head; is this the encoder alone?"
        )
    if tokenizer.pad_token_id is None:
        raise InputError(f"{source}: its tokenizer has no padding token. Set pad_token in its folder.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def _outputs(count: int, options: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """Which outputs are read: (m,) or (false, true)."""
    given = {name: options[name] for name in ("false", "true") if name in options}
    if len(given) == 1:
        raise InputError(f"teacher {source}: give both false=I and true=J, or none of them.")
    if not given and count > 2:
        raise InputError(
            f"teacher {source}: it has {count} outputs. Say which two to read: ?false=I&true=J, from 0."
        )
    chosen = (given["false"], given["true"]) if given else tuple(range(count))
    if max(chosen) >= count or len(set(chosen)) != len(chosen):
        raise InputError(
            f"teacher {source}: false={chosen[0]}&true={chosen[-1]}, but it has {count} outputs, numbered from 0. "
            "Expected two different ones."
        )
    return chosen


def _longest(tokenizer: Any, config: Any) -> int:
    """The tokens that both the tokenizer and the model's position table allow; 512 where neither says."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _HUGE else []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = (config.pad_token_id or 0) + 1 if config.model_type in _OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    return int(min(limits, default=512))
