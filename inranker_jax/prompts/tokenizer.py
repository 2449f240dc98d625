"""T5's SentencePiece tokenisation on the Rust `tokenizers` library, equal to `transformers.T5Tokenizer`.

A T5 vocabulary is a Unigram model. Its text passes through the normaliser stored in the SentencePiece file,
is split at white space, and every word gets a leading "▁". The `<extra_id_*>` sentinels follow the pieces in
falling order, so that `<extra_id_0>` has the highest id. transformers builds the same pipeline whether it
starts from `spiece.model` or from `tokenizer.json`; so does this module, without importing transformers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from inranker_jax.errors import InputError

SENTENCEPIECE_FILE = "spiece.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast")
# SentencePiece's ModelProto.SentencePiece.Type.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """Text to piece ids, without the end-of-sequence id.

    Ids equal `transformers.T5Tokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids` for
    every text. As there, special pieces written out in a text (`</s>`, `<pad>`, `<extra_id_0>`) become the
    special id, not their letters.
    """

    def __init__(
        self, backend: Backend, roles: Mapping[str, str], *, spiece: bytes | None = None, t5: bool = True
    ):
        """Wraps a Rust tokenizer; users call `from_pretrained` or `from_sentencepiece`.

        Args:
          backend: the Rust tokenizer, special pieces included.
          roles: the pieces that play `eos_token`, `pad_token`, `unk_token`.
          spiece: bytes of the SentencePiece file that the backend came from, which `save` writes back.
          t5: whether the backend is T5's pipeline; False for other tokenizers taken from a `tokenizer.json`
            as is.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._roles = dict(roles)
        self._spiece = spiece
        self._t5 = t5
        self._fingerprint: str | None = None
        self.eos_id = self._role_id("eos_token")
        self.pad_id = self._role_id("pad_token")
        self.unk_id = self._role_id("unk_token")

    def _role_id(self, role: str) -> int:
        piece = self._roles.get(role)
        found = None if piece is None else self._backend.token_to_id(piece)
        if found is None:
            raise InputError(
                f"the tokenizer has no {role} ({piece!r} is not among its {self.vocab_size} pieces). "
                f"Expected a T5 vocabulary; name the piece as {role!r} in {CONFIG_FILE}."
            )
        return found

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads a tokenizer folder as `transformers.T5Tokenizer.from_pretrained` does.

        Args:
          folder: holds `tokenizer.json` (preferred when both are there) or `spiece.model`, and optionally
            `tokenizer_config.json` and `special_tokens_map.json`.

        Returns:
          The tokenizer.

        Raises:
          InputError: no tokenizer files, or files that cannot be read as a tokenizer.
        """
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise InputError.at(
                root, None, "no such folder", f"a folder with {JSON_FILE} or {SENTENCEPIECE_FILE}"
            )
        config = _read_json(root / CONFIG_FILE) or {}
        json_path, spiece_path = root / JSON_FILE, root / SENTENCEPIECE_FILE
        spiece = spiece_path.read_bytes() if spiece_path.is_file() else None
        tokenizer_class = config.get("tokenizer_class")
        settings = _Settings.read(
            config, _read_json(root / SPECIAL_TOKENS_FILE), _read_json(root / "added_tokens.json")
        )
        if json_path.is_file():
            saved = _read_json(json_path) or {}
            unigram = isinstance(saved.get("model", {}).get("vocab"), list)
            if unigram and tokenizer_class in (None, *_T5_CLASSES):
                return cls._from_saved(saved, settings, spiece)
            try:
                backend = Backend.from_file(str(json_path))
            except Exception as error:  # the Rust library raises bare Exception
                raise InputError.at(
                    json_path, None, f"not a tokenizer ({error})", "a file of the tokenizers library"
                ) from error
            return cls(backend, settings.roles, spiece=spiece, t5=False)
        if spiece is None:
            there = ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "nothing"
            raise InputError.at(
                root,
                None,
                "no tokenizer files",
                f"{JSON_FILE} or {SENTENCEPIECE_FILE}; the folder holds {there}",
                "Copy the tokenizer files of the base model into it",
            )
        return cls._from_proto(spiece, settings, spiece_path)

    @classmethod
    def from_sentencepiece(cls, path: str | os.PathLike[str], extra_ids: int = 100) -> Tokenizer:
        """Builds T5's tokenizer from a SentencePiece file.

        Args:
          path: a trained Unigram `.model` file.
          extra_ids: how many `<extra_id_*>` sentinels follow the pieces (T5: 100, mT5: 0).

        Returns:
          The tokenizer.

        Raises:
          InputError: the file is missing or not a SentencePiece Unigram model, or `extra_ids` is negative.
        """
        if extra_ids < 0:
            raise InputError(f"extra_ids is {extra_ids}; expected 0 or more (T5 has 100).")
        path = pathlib.Path(path)
        if not path.is_file():
            raise InputError.at(path, None, "no such file", "a SentencePiece model such as spiece.model")
        return cls._from_proto(path.read_bytes(), _Settings.read({"extra_ids": extra_ids}, None, None), path)

    @classmethod
    def _from_proto(cls, spiece: bytes, settings: _Settings, path: pathlib.Path) -> Tokenizer:
        proto = _parse_sentencepiece(spiece, path)
        vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
        vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(settings.extra_ids))]
        # The control and user-defined pieces of the file stand before the sentinels, and hide any
        # `additional_special_tokens` of special_tokens_map.json.
        file_tokens = [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
        tokens = settings.tokens_to_add(file_tokens, ())
        backend = _t5_backend(vocabulary, proto.normalizer_spec.precompiled_charsmap, tokens, settings.roles)
        return cls(backend, settings.roles, spiece=spiece)

    @classmethod
    def _from_saved(cls, saved: Mapping[str, Any], settings: _Settings, spiece: bytes | None) -> Tokenizer:
        vocabulary = [(str(piece), float(score)) for piece, score in saved["model"]["vocab"]]
        normalizer = saved.get("normalizer") or {}
        parts = normalizer.get("normalizers", [normalizer])
        charsmaps = [part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled"]
        charsmap = base64.b64decode(charsmaps[0]) if charsmaps else b""
        tokens = settings.tokens_to_add(None, saved.get("added_tokens", ()))
        return cls(_t5_backend(vocabulary, charsmap, tokens, settings.roles), settings.roles, spiece=spiece)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, sentinels and other added pieces included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything that decides ids; equal however the tokenizer was stored."""
        if self._fingerprint is None:
            state = json.loads(self._backend.to_str())
            state.pop("version", None)
            text = json.dumps([state, self._roles], sort_keys=True, ensure_ascii=True)
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    def piece_to_id(self, piece: str) -> int | None:
        """Returns the id of a piece ("▁true"), or None when the vocabulary does not hold it."""
        return self._backend.token_to_id(piece)

    def id_to_piece(self, index: int) -> str | None:
        """Returns the piece of an id, or None when there is no such id."""
        return self._backend.id_to_token(index)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenises texts in parallel.

        Args:
          texts: n texts of any length.

        Returns:
          n lists of ids, without end-of-sequence ids.

        Raises:
          InputError: an item is not a str, or holds an unpaired surrogate (which is not Unicode text).
        """
        return [encoding.ids for encoding in self._encode(texts, spans=False)]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Tokenises texts and says from which characters each id came.

        Args:
          texts: n texts.

        Returns:
          n pairs (ids, spans); a span is (first character, one past the last) in the text as given.

        Raises:
          InputError: as `encode_batch`.
        """
        return [(encoding.ids, encoding.offsets) for encoding in self._encode(texts, spans=True)]

    def _encode(self, texts: Sequence[str], *, spans: bool) -> list[Any]:
        texts = list(texts)
        encode = self._backend.encode_batch if spans else self._backend.encode_batch_fast
        try:
            return encode(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for index, text in enumerate(texts):
                check_text(text, f"text {index}")
            raise

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer so that transformers and `from_pretrained` read the same ids back.

        Args:
          folder: created when missing. Gets `tokenizer.json`, `tokenizer_config.json` and, when the tokenizer
            came from a SentencePiece file, `spiece.model`.
        """
        root = pathlib.Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        if self._spiece is not None:
            (root / SENTENCEPIECE_FILE).write_bytes(self._spiece)
        (root / JSON_FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        added = [str(token.content) for token in self._backend.get_added_tokens_decoder().values()]
        sentinels = [piece for piece in added if piece.startswith("<extra_id_")]
        sentinels.sort(key=lambda piece: (len(piece), piece))
        config: dict[str, Any] = {
            "tokenizer_class": "T5Tokenizer" if self._t5 else "PreTrainedTokenizerFast",
            **self._roles,
            "additional_special_tokens": sentinels,
            "clean_up_tokenization_spaces": False,
        }
        if self._t5:
            config["extra_ids"] = len(sentinels)
        (root / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


class _Settings:
    """What the JSON files beside a vocabulary say about special pieces, resolved in transformers' order."""

    def __init__(self, values: dict[str, Any], added: dict[int, AddedToken], has_decoder: bool):
        self._values = values
        self._added = added
        self._has_decoder = has_decoder
        self.extra_ids = int(values.get("extra_ids", 100))
        named = {**_DEFAULT_TOKENS, **{k: values[k] for k in _ROLES if values.get(k) is not None}}
        self._named = {role: _added_token(token) for role, token in named.items()}
        self.roles = {role: token.content for role, token in self._named.items()}

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        special_map: Mapping[str, Any] | None,
        added_map: Mapping[str, Any] | None,
    ) -> _Settings:
        """Merges `tokenizer_config.json`, `special_tokens_map.json` and the old `added_tokens.json`.

        A config with `added_tokens_decoder` is complete in itself: the other two are then not looked at.
        """
        values = dict(config)
        if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
            values["extra_special_tokens"] = values.pop("additional_special_tokens")
        decoder = values.get("added_tokens_decoder")
        if decoder is not None:
            return cls(values, {int(index): _added_token(token) for index, token in decoder.items()}, True)
        for key, value in (special_map or {}).items():
            if key == "extra_special_tokens" and isinstance(value, list):
                value = [*(values.get(key) or []), *value]
            values[key] = value
        extra = values.get("extra_special_tokens")
        special = {_content(values[k]) for k in _ROLES if values.get(k)} | {_content(t) for t in extra or ()}
        added = {
            int(index): AddedToken(piece, normalized=piece not in special, special=piece in special)
            for piece, index in (added_map or {}).items()
        }
        return cls(values, added, False)

    def tokens_to_add(
        self, file_tokens: list[AddedToken] | None, saved_tokens: Sequence[Mapping[str, Any]]
    ) -> list[AddedToken]:
        """Lists the pieces matched in raw text before the model runs, in the order in which they are added.

        Args:
          file_tokens: control and user-defined pieces of a SentencePiece file, or None without one.
          saved_tokens: `added_tokens` of a tokenizer.json.

        Returns:
          Added tokens, each content once.
        """
        added = dict(self._added)
        if not self._has_decoder:
            added.update({int(token["id"]): _added_token(token) for token in saved_tokens})
        sentinels = [
            AddedToken(f"<extra_id_{i}>", special=True, normalized=False) for i in range(self.extra_ids)
        ]
        additional = file_tokens
        if additional is None and self._values.get("additional_special_tokens") is not None:
            additional = [_added_token(token) for token in self._values["additional_special_tokens"]]
        if additional is None:
            additional = sentinels
        named_sentinels = sum("<extra_id_" in token.content for token in additional)
        if not named_sentinels:
            additional = additional + sentinels
        elif self.extra_ids not in (0, named_sentinels):
            raise InputError(
                f"extra_ids is {self.extra_ids}, but the vocabulary itself names {named_sentinels} "
                f"<extra_id_*> pieces. Write extra_ids 0 or {named_sentinels} in {CONFIG_FILE}."
            )
        # A config that names its extra tokens, even as null, replaces the default ones.
        extra = self._values.get("extra_special_tokens", additional)
        if isinstance(extra, Mapping):
            extra = list(extra.values())
        model_specific = [
            token
            for key, token in self._values.items()
            if key.endswith("_token") and key not in _ROLES and isinstance(token, str | dict)
        ]
        ordered = [token for _, token in sorted(added.items())]
        ordered += [self._named[role] for role in (*_ROLES,) if role in self._named]
        ordered += [_added_token(token) for token in (*model_specific, *(extra or ()))]
        unique: dict[str, AddedToken] = {}
        for token in ordered:
            unique.setdefault(token.content, token)
        return list(unique.values())


def _t5_backend(
    vocabulary: list[tuple[str, float]], charsmap: bytes, tokens: list[AddedToken], roles: Mapping[str, str]
) -> Backend:
    """Assembles normaliser, splitter, Unigram model and added pieces. T5 fixes the unknown id at 2."""
    backend = Backend(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.add_tokens(tokens)
    eos = roles["eos_token"]
    eos_id = backend.token_to_id(eos)
    if eos_id is not None:
        # Only for readers of the saved file; here the end-of-sequence id is the contract's business.
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, eos_id)]
        )
    return backend


def _parse_sentencepiece(data: bytes, path: pathlib.Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # generated code, without types
    proto = messages.ModelProto()
    expected = "a SentencePiece Unigram model, as every T5 has"
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise InputError.at(
            path, None, "not a SentencePiece model", expected, "Download the file again"
        ) from error
    if len(proto.pieces) < 3:
        raise InputError.at(path, None, f"a SentencePiece model of {len(proto.pieces)} pieces", expected)
    if proto.trainer_spec.model_type != 1:
        kind = messages.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise InputError.at(path, None, f"a SentencePiece model of type {kind}", expected)
    return proto


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _added_token(token: str | Mapping[str, Any] | AddedToken) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, normalized=False, special=True)
    special = bool(token.get("special", True))
    flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(
        _content(token), special=special, normalized=bool(token.get("normalized", not special)), **flags
    )


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", None)
        raise InputError.at(
            path, line, f"not JSON ({error})", "a JSON object", "Download the file again"
        ) from error
    if not isinstance(value, dict):
        raise InputError.at(path, None, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def check_text(text: object, place: str) -> None:
    """Raises InputError, naming `place`, unless `text` is a str of valid Unicode."""
    if not isinstance(text, str):
        remedy = " Decode it with .decode('utf-8')." if isinstance(text, bytes) else ""
        raise InputError(f"{place} is {type(text).__name__}; expected str.{remedy}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds the unpaired surrogate {text[error.start]!r} at character {error.start}, which "
            "is not Unicode text. Repair it with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error
