"""Queries from a causal language model on this machine, through transformers (the extra `teachers`)."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from inranker_jax import hub, paths
from inranker_jax.corpora import files
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.query_generation.budget import Budget
from inranker_jax.query_generation.generators import Generation, Request, first_line
from inranker_jax.query_generation.templates import cut_at, estimate_tokens

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DECIDING = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class LocalSettings:
    """Which model, and how to run it.

    Attributes:
      model: a folder with a Hugging Face causal language model and its tokenizer, or a name on the hub.
      chat: whether prompts go through the tokenizer's chat template, as a user's message.
      batch_size: prompts at a time. Padding changes the last bits of a logit, so that another batch size can change
        an answer where two tokens are all but equally probable.
      max_new_tokens: of an answer.
      device: a torch device; None takes CUDA or MPS where there is one.
      dtype: of the weights; "auto" is the checkpoint's own.
    """

    model: str
    chat: bool = False
    batch_size: int = 8
    max_new_tokens: int = 64
    device: str | None = None
    dtype: str = "auto"


class LocalGenerator:
    """Greedy decoding, in batches, stopped at the line break; log-probabilities from the model's own logits.

    Raises:
      InputError: transformers is not installed, or the model cannot be loaded.
    """

    prompted = True

    def __init__(self, settings: LocalSettings, budget: Budget | None = None) -> None:
        if settings.dtype not in DTYPES:
            raise InputError(
                f"--dtype={settings.dtype}: expected {', '.join(DTYPES)}.{did_you_mean(settings.dtype, DTYPES)}"
            )
        self._settings = settings
        self._budget = budget or Budget()
        _check_packages()  # before gigabytes are fetched, and before minutes are spent on the corpus
        # A name on the hub, or a folder of this machine: as it was given, since "./gpt2" is no name on the hub.
        self._source = settings.model
        if paths.is_remote(settings.model):
            self._source = str(paths.local_copy(settings.model, skip=hub.NOT_DOWNLOADED))
        self._tokenizer = _load_tokenizer(settings, self._source)
        # Of the hub's model, so that the weights are those of the identity even if the hub gets others meanwhile.
        self._commit = None if pathlib.Path(self._source).is_dir() else _hub_commit(self._source)
        self._model: Any = None  # loaded for the first prompt: to filter again, none is needed
        if settings.chat and not self._tokenizer.chat_template:
            raise InputError(
                f"--api=chat: the tokenizer of {settings.model} has no chat template. Leave --api out for a base model."
            )
        self.name = f"local:{settings.model}"
        self.identity: dict[str, Any] = {
            "kind": "local",
            "model": settings.model,
            "files": self._commit or _folder_digest(pathlib.Path(self._source)),
            "api": "chat" if settings.chat else "completions",
            "dtype": settings.dtype,
            "max_new_tokens": settings.max_new_tokens,
        }

    def cut(self, text: str, limit: int) -> str:
        """Cuts a document after `limit` tokens of the model's own vocabulary."""
        if not self._tokenizer.is_fast:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return text if len(ids) <= limit else str(self._tokenizer.decode(ids[:limit])).strip()
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return cut_at(text, encoded["offset_mapping"], limit)

    def close(self) -> None:
        """Frees the model."""
        self._model = None

    def generate(self, requests: Iterable[Request], stop: Callable[[], bool]) -> Iterator[list[Generation]]:
        """Yields the answers batch by batch, in the order of the requests.

        Raises:
          InputError: a prompt and its answer do not fit the model's positions.
        """
        remaining = iter(requests)
        while not stop() and (batch := self._affordable(remaining)):
            if self._model is None:
                self._model = _load_model(self._settings, self._source, self._commit)
            yield self._answer(batch)
            for request in batch:
                self._budget.release(estimate_tokens(request.prompt), self._settings.max_new_tokens, 1)

    def _affordable(self, remaining: Iterator[Request]) -> list[Request]:
        batch: list[Request] = []
        for request in itertools.islice(remaining, self._settings.batch_size):
            if not self._budget.reserve(estimate_tokens(request.prompt), self._settings.max_new_tokens):
                break
            batch.append(request)
        return batch

    def _answer(self, batch: list[Request]) -> list[Generation]:
        import torch

        settings = self._settings
        prompts = [request.prompt for request in batch]
        if settings.chat:
            prompts = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        # A chat template writes the special tokens itself.
        encoded = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=not settings.chat,
            return_token_type_ids=False,
        )  # fmt: skip
        width = encoded["input_ids"].shape[1]
        self._check_room(width, batch)
        recorder = _Recorder()
        with torch.inference_mode():
            output = self._model.generate(
                **encoded.to(self._model.device),
                generation_config=self._generation_config(),
                logits_processor=_processors(recorder),
                stopping_criteria=_stopping_criteria(self._stops_at_line_break(width)),
            )
        new = output[:, width:].tolist()
        log_probs = torch.stack(recorder.steps, dim=1).tolist() if recorder.steps else [[] for _ in batch]
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        return [
            self._generation(request, ids, values, length)
            for request, ids, values, length in zip(batch, new, log_probs, lengths, strict=True)
        ]

    def _check_room(self, width: int, batch: list[Request]) -> None:
        config = self._model.config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        needed = width + self._settings.max_new_tokens
        if positions is not None and needed > positions:
            longest = max(batch, key=lambda request: len(request.prompt)).document.id
            raise InputError(
                f"a prompt of {width} tokens and an answer of {self._settings.max_new_tokens} need {needed} positions; "
                f"{self._settings.model} has {positions} (document {longest!r}). Lower --document_tokens or "
                "--max_new_tokens, or take a shorter prompt."
            )

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        own = self._model.generation_config
        # Every field that would change greedy decoding is set: what is left out comes from the checkpoint's file.
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            max_new_tokens=self._settings.max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id,
        )

    def _stops_at_line_break(self, width: int) -> Callable[..., Any]:
        import torch

        tokenizer = self._tokenizer
        done: dict[int, bool] = {}

        def stops(input_ids: Any, scores: Any, **unused: Any) -> Any:
            last = input_ids[:, -1].tolist()
            for token in {*last} - {*done}:
                done[token] = "\n" in tokenizer.decode([token])
            return torch.tensor([done[token] for token in last], device=input_ids.device)

        return stops

    def _generation(self, request: Request, ids: list[int], values: list[float], length: int) -> Generation:
        special = {self._tokenizer.pad_token_id, *self._tokenizer.all_special_ids}
        count, ended = len(ids), False
        for index, token in enumerate(ids):
            if token in special:
                count, ended = index, True
                break
            if "\n" in self._tokenizer.decode([token]):
                # A token such as "?\n" is the query's last one; the bare line break is not part of it.
                bare = not self._tokenizer.decode([token]).split("\n", 1)[0].strip()
                count, ended = index + (not bare), True
                break
        text = str(self._tokenizer.decode(ids[:count], skip_special_tokens=True))
        return Generation(
            request.document.id,
            first_line(text),
            log_probs=tuple(values[:count]),
            finish="stop" if ended else "length",
            prompt_tokens=int(length),
            completion_tokens=min(len(ids), count + ended),
        )


class _Recorder:
    """Keeps the log-probability of the token that greedy decoding takes at each step: the largest one.

    So no logits are kept, which at 64 steps of a vocabulary of 128k would be gigabytes.
    """

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        values = scores.float()
        self.steps.append(values.max(dim=-1).values - values.logsumexp(dim=-1))
        return scores


def _processors(recorder: _Recorder) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([recorder])


def _stopping_criteria(stops: Callable[..., Any]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([stops])


def _check_packages() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--generator=local needs the package {error.name!r}: run `pip install 'inranker_jax[teachers]'`."
        ) from error


def _load_tokenizer(settings: LocalSettings, source: str) -> Any:
    import transformers

    path = pathlib.Path(source)
    if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~"))):
        raise InputError(f"--generator=local:{settings.model}: no such folder.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(settings, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {settings.model} has neither a pad nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(settings: LocalSettings, source: str, commit: str | None) -> Any:
    import torch
    import transformers

    try:
        dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, revision=commit or "main"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(settings, error) from error
    device = settings.device
    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--device={device}: the model cannot be put there ({reason}).") from error


def _not_loaded(settings: LocalSettings, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"--generator=local:{settings.model}: cannot be loaded ({reason}). Expected a folder with a causal "
        "language model and its tokenizer in Hugging Face's format, or its name on the hub."
    )


def _hub_commit(model: str) -> str | None:
    """The commit of a hub model whose tokenizer was just loaded, from where the hub's cache keeps it."""
    import huggingface_hub

    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        path = huggingface_hub.try_to_load_from_cache(model, name)
        if isinstance(path, str):
            return pathlib.Path(path).parent.name
    return None


def _folder_digest(folder: pathlib.Path) -> str:
    """First 16 hex digits of the SHA-256 over names and contents of a model's weights, settings and vocabulary."""
    if not folder.is_dir():
        return ""
    deciding = [path for path in sorted(folder.iterdir()) if path.suffix in _DECIDING and path.is_file()]
    if any(path.suffix == ".safetensors" for path in deciding):  # pickled weights beside them are not read
        deciding = [path for path in deciding if path.suffix != ".bin"]
    lines = "".join(f"{path.name} {files.fingerprint([str(path)])}\n" for path in deciding)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
