"""sentence-transformers bi-encoders as teachers: margin = scale * similarity + offset."""

from __future__ import annotations

import collections
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# The factor that sentence-transformers' contrastive loss trains cosines with: margins then are logits.
COSINE_SCALE = 20.0
_CACHED = 100_000
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_LIBRARY_BATCH = 32
Key = tuple[str, str]  # (role, text)


class BiEncoderTeacher(torch_calls.TorchTeacher):
    """A `SentenceTransformer`; each distinct text of a chunk is encoded once.

    Embeddings are kept for later chunks where that cannot change a value: on a CPU, with the default of one text
    a call.

    Args:
      spec: options `scale` (20 for cosines, 1 for dot products), `offset` (0), `similarity` (the model's own,
        else cosine), `pooling` for a folder without `modules.json`, `query_prompt` and `document_prompt` (the
        model's own), `cache` (how many texts' embeddings are kept, 100000), `dtype`, `max_length`,
        `tokens_per_call`, `device`.

    Raises:
      InputError: a package is missing, there is no such model, or an option does not fit it.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        torch = torch_calls.load_torch()
        library = optional_package("sentence_transformers")
        options = spec.options
        folder = model_folder(spec.path)
        super().__init__(spec, torch, library)
        with torch_calls.quiet(optional_package("transformers")):
            self._model = _load(library, folder, spec, self._device, torch)
        self._model.eval()
        if "max_length" in options:
            if self._model.max_seq_length and options["max_length"] > self._model.max_seq_length:
                raise InputError(
                    f"teacher {spec.path}: max_length={options['max_length']}, but the model reads "
                    f"{self._model.max_seq_length} tokens."
                )
            self._model.max_seq_length = options["max_length"]
        own = self._model.similarity_fn_name
        similarity = options.get("similarity", own)
        if similarity not in ("cosine", "dot"):
            raise InputError(
                f"teacher {spec.path}: its similarity is {own!r}, which gives no margins. Choose "
                "similarity=cosine or similarity=dot."
            )
        self._cosine = similarity == "cosine"
        self._scale = options.get("scale", COSINE_SCALE if self._cosine else 1.0)
        self._offset = options.get("offset", 0.0)
        self._prompts = {
            "query": _prompt(self._model, options.get("query_prompt"), ("query",)),
            "document": _prompt(
                self._model, options.get("document_prompt"), ("document", "passage", "corpus")
            ),
        }
        self._routed = any(type(module).__name__ == "Router" for module in self._model)
        self._kept: collections.OrderedDict[Key, np.ndarray] = collections.OrderedDict()
        self._limit = options.get("cache", _CACHED)
        self._identity = {
            "kind": "bi-encoder",
            "files": folder_digest(folder, _module_folders(folder)),
            "dtype": options.get("dtype", "float32"),
            "max_length": self._model.max_seq_length,
            "similarity": similarity,
            "scale": self._scale,
            "offset": self._offset,
            "pooling": options.get("pooling"),
            "prompts": self._prompts,
        }
        self._runner = torch_calls.Runner(self._device, self._tokens)

    def logits(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """See `Teacher`. Embeddings kept from earlier chunks are those that would be computed again."""
        for chunk in chunks:
            texts = [strip_pair(pair) for pair in chunk]
            wanted = [("query", query) for query, _ in texts] + [("document", text) for _, text in texts]
            vectors = self._embed(list(dict.fromkeys(wanted)))
            margins = np.zeros(len(texts))
            for row, (query, document) in enumerate(texts):
                left, right = vectors["query", query], vectors["document", document]
                product = float(left @ right)
                if self._cosine:
                    product /= max(float(np.sqrt((left @ left) * (right @ right))), 1e-12)
                margins[row] = self._scale * product + self._offset
            yield check_finite(split_margin(margins), chunk, self.name)

    def _embed(self, wanted: Sequence[Key]) -> dict[Key, np.ndarray]:
        """Embeddings, float64 [width], of distinct texts; from the cache where it has them."""
        vectors = {key: self._kept[key] for key in wanted if key in self._kept}
        for role in self._prompts:
            texts = [text for key_role, text in wanted if key_role == role and (role, text) not in vectors]
            if texts:
                encoded, exact = self._encode(role, texts)
                new = {(role, text): vector for text, vector in zip(texts, encoded, strict=True)}
                vectors.update(new)
                # What depends on its neighbours must not reach another chunk.
                self._kept.update(new if exact else {})
        for key in wanted:
            if key in self._kept:
                self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return vectors

    def _encode(self, role: str, texts: Sequence[str]) -> tuple[np.ndarray, bool]:
        """Encodes texts.

        Returns:
          float64 [n, width], and whether each row depends on its text alone: so it is where each text is a call
          of its own, on a CPU. Models that take more than token ids are left to the library's batches.
        """
        prompt = self._prompts[role]
        prompted = [prompt + text for text in texts]
        features = None if self._routed else _features(self._model, prompted)
        if features is None:
            encode = self._model.encode_query if role == "query" else self._model.encode_document
            with self._torch.inference_mode():
                found = encode(list(texts), prompt=prompt, batch_size=_LIBRARY_BATCH, show_progress_bar=False)
            return np.asarray(found, np.float64), False
        return self._compute(features, len(texts)), self._tokens is None

    def _compute(self, features: dict[str, Any], count: int) -> np.ndarray:
        tokenizer = self._model.tokenizer
        lengths = features["attention_mask"].sum(dim=1).tolist()
        longest = int(self._model.max_seq_length or max(torch_calls.LENGTHS))
        fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}

        def compute(call: torch_calls.Call) -> Any:
            inputs = dict(features)
            for name in _INPUTS & features.keys():
                rows = torch_calls.resize(
                    features[name][call.rows], call.length, fills[name], tokenizer.padding_side
                )
                inputs[name] = rows.to(self._device)
            return self._model(inputs)["sentence_embedding"]

        calls = self._runner.run(compute, torch_calls.plan(lengths, max(longest, *lengths), self._tokens))
        parts: list[np.ndarray | None] = [None] * count
        for call, outputs in calls:
            for row, vector in zip(call.rows[: call.count], outputs.float().cpu().numpy(), strict=False):
                parts[row] = vector.astype(np.float64)
        return np.stack([part for part in parts if part is not None])

    def close(self) -> None:
        """See `Teacher`."""
        self._kept.clear()
        super().close()


def _load(library: Any, folder: pathlib.Path, spec: TeacherSpec, device: Any, torch: Any) -> Any:
    pooling = spec.options.get("pooling")
    has_modules = (folder / "modules.json").is_file()
    if pooling and has_modules:
        raise InputError(
            f"teacher {spec.path}: it has modules.json, which fixes its pooling. Leave pooling={pooling} out."
        )
    if not pooling and not has_modules:
        raise InputError(
            f"teacher {spec.path}: it has no modules.json, so it is no sentence-transformers model. If it is a "
            "plain encoder, say how its token vectors are pooled: ?pooling=mean, cls, max or lasttoken."
        )
    settings = {"dtype": getattr(torch, spec.options.get("dtype", "float32"))}
    try:
        if not pooling:
            return library.SentenceTransformer(
                str(folder), device=str(device), local_files_only=True, model_kwargs=settings
            )
        modules = optional_package(_modules_package())
        transformer = modules.Transformer(str(folder), model_args=settings)
        layers = [
            transformer,
            modules.Pooling(transformer.auto_model.config.hidden_size, pooling_mode=pooling),
        ]
        return library.SentenceTransformer(modules=layers, device=str(device))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{spec.path}: sentence-transformers cannot load it ({str(error).splitlines()[0]})."
        ) from error


def _module_folders(folder: pathlib.Path) -> list[str]:
    """The folders of the modules that `modules.json` lists."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    return [module["path"] for module in modules if module.get("path")]


def _modules_package() -> str:
    """Where sentence-transformers keeps its modules: version 6 moved them."""
    new = "sentence_transformers.sentence_transformer"
    return f"{new}.modules" if importlib.util.find_spec(new) else "sentence_transformers.models"


def _prompt(model: Any, given: str | None, names: Sequence[str]) -> str:
    """What is put before a text: the option, else the model's own prompt for that role, else nothing."""
    if given is not None:
        return given
    return next((model.prompts[name] for name in names if model.prompts.get(name)), "")


def _features(model: Any, texts: Sequence[str]) -> dict[str, Any] | None:
    """Token ids and masks, int64 [n, longest], of a model that reads nothing else; None for other models."""
    if getattr(model, "tokenizer", None) is None or getattr(model.tokenizer, "pad_token_id", None) is None:
        return None
    prepare: Callable[[list[str]], dict[str, Any]] = getattr(model, "preprocess", None) or model.tokenize
    features = prepare(list(texts))
    tensors = {name for name, value in features.items() if hasattr(value, "shape")}
    if not {"input_ids", "attention_mask"} <= tensors <= _INPUTS or features["input_ids"].ndim != 2:
        return None
    # Where prompts are left out of pooling, the library needs to know their length.
    if any(getattr(module, "include_prompt", True) is False for module in model):
        return None
    return dict(features)
