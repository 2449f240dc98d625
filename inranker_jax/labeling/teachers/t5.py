"""T5 rerankers as teachers: any checkpoint that this project loads, divided over this process's devices."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers.base import Chunk, check_finite, read_json, split_margin, strip_pair
from inranker_jax.labeling.teachers.spec import TeacherSpec
from inranker_jax.packing import Layout

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from inranker_jax.prompts import ScoringContract
    from inranker_jax.scorer import Reranker

_AXES = ("data", "fsdp", "model")
_LAYOUT = {
    "layout": "kind",
    "row_length": "row_length",
    "slots": "slots",
    "tokens_per_call": "tokens_per_call",
}
_LAYER = re.compile(r"layers_\d+")


class T5Teacher:
    """A `Reranker` whose raw label logits are the labels. One logit m (RankT5) becomes (-m/2, +m/2).

    The model is read when its identity or its logits are first asked for. Of a Hugging Face checkpoint one
    tensor at a time is on the host, and goes straight to the devices that hold its parts, as the type it is
    computed in: 3B and 11B fit where their shards do.

    Args:
      spec: options `contract` (a preset's name or a JSON file; by default the one stored with the model, else
        the one its name is known for), `dtype`, those of `packing.Layout` (`layout` for its kind, `row_length`,
        `slots`, `tokens_per_call`), and the mesh over this process's devices: `data`, `fsdp`, `model`. Without
        those, all accelerators as `data`, or one CPU device.

    Raises:
      InputError: a mesh that does not fit the devices, or an unknown contract.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._dtype: str = spec.options.get("dtype", "float32")
        self._layout = Layout(
            **{field: spec.options[name] for name, field in _LAYOUT.items() if name in spec.options}
        )
        self._contract = _contract(spec.options.get("contract"))
        self._mesh = _mesh({axis: spec.options[axis] for axis in _AXES if axis in spec.options})
        self._loaded: tuple[Reranker, dict[str, Any]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """See `Teacher`: parameters, architecture, vocabulary, contract and precision; not where they lie.

        Nor the layout: like another device, it changes logits by rounding only.
        """
        return self._load()[1]

    @property
    def provenance(self) -> dict[str, Any]:
        """See `Teacher`."""
        import jax

        device = jax.local_devices()[0]
        mesh = None if self._mesh is None else "x".join(str(self._mesh.shape[axis]) for axis in _AXES)
        return {
            "path": self._spec.path,
            "device": device.device_kind,
            "devices": 1 if self._mesh is None else int(self._mesh.devices.size),
            "mesh": mesh,
            "layout": self._layout.resolve(device.platform, 1).kind,
            "versions": {"jax": jax.__version__},
        }

    def logits(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """See `Teacher`. Each chunk is one window of the scorer; the next is dispatched before it is awaited."""
        reranker, _ = self._load()
        held: list[Chunk] = []

        def texts() -> Iterator[list[tuple[str, str]]]:
            for chunk in chunks:
                held.append(chunk)
                yield [strip_pair(pair) for pair in chunk]

        for values in reranker.logits_of_chunks(texts()):
            chunk = held.pop(0)
            pairs = split_margin(values[:, 0]) if values.shape[-1] == 1 else values
            yield check_finite(pairs, chunk, self.name)

    def close(self) -> None:
        """See `Teacher`."""
        self._loaded = None

    def _load(self) -> tuple[Reranker, dict[str, Any]]:
        if self._loaded is None:
            from inranker_jax import compilation_cache
            from inranker_jax.checkpoints import load_model
            from inranker_jax.scorer import Reranker

            compilation_cache.enable()
            placer = _Placer(self._mesh, self._dtype)
            with _other_kinds(self._spec.path):
                model = load_model(self._spec.path, place=placer)
            tokenizer, contract = model.tokenizer, self._contract or model.contract
            if tokenizer is None:
                raise InputError(
                    f"{self._spec.path} has no tokenizer. Copy tokenizer.json or spiece.model of its base "
                    "model into it."
                )
            if contract is None:
                raise _no_contract(self._spec.path)
            reranker = Reranker(
                model.config,
                model.params,
                tokenizer,
                contract,
                dtype=self._dtype,
                layout=self._layout,
                mesh=self._mesh,
            )
            identity = {
                "kind": "t5",
                "parameters": placer.digest(),
                "architecture": model.config.to_hf_dict(),
                "vocabulary": tokenizer.fingerprint,
                "contract": contract.to_dict(),
                "dtype": self._dtype,
            }
            self._loaded = reranker, identity
        return self._loaded


class _Placer:
    """Takes the parameters one by one: hashes each in float32, and puts it on the devices that compute with it."""

    def __init__(self, mesh: Mesh | None, dtype: str) -> None:
        from inranker_jax.models import Compute

        self._mesh = mesh
        self._compute = Compute(dtype=dtype)
        self._digests: dict[str, str] = {}

    def __call__(self, path: str, array: np.ndarray) -> jax.Array:
        import jax
        import jax.numpy as jnp

        value = np.ascontiguousarray(array, np.float32)
        digest = hashlib.sha256(f"{value.shape}".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
        self._digests[path] = digest.hexdigest()
        # As the reranker stores them; before the transfer, so that float32 never needs the devices' memory.
        placed: Any = value.astype(jnp.bfloat16) if self._compute.rounds(path) else value
        if self._mesh is None:
            return jnp.asarray(placed)
        return jax.device_put(placed, _sharding(self._mesh, path, value.shape))

    def digest(self) -> str:
        """SHA-256 over all parameters, whatever order they came in."""
        lines = "".join(f"{path} {digest}\n" for path, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Any:
    """The sharding of one parameter, which must be known before the whole architecture is."""
    import jax

    from inranker_jax.partitioning import param_shardings

    names = _axis_names(path)
    return param_shardings(mesh, {path: names}, {path: jax.ShapeDtypeStruct(shape, np.float32)})[path]


def _axis_names(path: str) -> tuple[str | None, ...]:
    """Logical axis names of a parameter: they follow from its path, whatever the sizes and the layer."""
    table = _axis_table()
    pattern = _LAYER.sub("layers_0", path)
    if pattern not in table:
        raise InputError(f"parameter {path} has no axis names. It belongs to no T5 that this project knows.")
    return table[pattern]


@functools.cache
def _axis_table() -> dict[str, tuple[str | None, ...]]:
    from inranker_jax.models import T5Config, trees
    from inranker_jax.models.t5 import logical_axes

    table: dict[str, tuple[str | None, ...]] = {}
    for kind in ("relu", "gated-gelu"):
        config = T5Config(
            vocab_size=8,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            feed_forward_proj=kind,
            tie_word_embeddings=False,
        )
        table.update(trees.flatten(logical_axes(config)))
    return table


def check(spec: TeacherSpec) -> None:
    """Looks whether there is a T5 with a scoring contract, without reading its weights.

    Raises:
      InputError: no such model, one of another architecture, or a contract that is unknown.
    """
    from inranker_jax.checkpoints import check_model, huggingface
    from inranker_jax.prompts import preset_for_model

    contract = _contract(spec.options.get("contract"))
    with _other_kinds(spec.path):
        check_model(spec.path)
    folder = pathlib.Path(spec.path).expanduser()
    stored = not (folder / huggingface.CONFIG).is_file() or (folder / huggingface.CONTRACT).is_file()
    if not (contract or stored or preset_for_model(spec.path)):
        raise _no_contract(spec.path)


def _no_contract(source: str) -> InputError:
    return InputError(
        f"{source} stores no scoring contract, and its name belongs to no known family. Say how it was trained: "
        f"t5:{source}?contract=monot5 (see inranker_jax.prompts.PRESETS)."
    )


@contextlib.contextmanager
def _other_kinds(source: str) -> Iterator[None]:
    """Tells of the other kinds of teachers where a model is no T5."""
    from inranker_jax.models import ArchitectureError

    try:
        yield
    except ArchitectureError as error:
        raise InputError(
            f"{error} A teacher is read as a T5 reranker where no kind is given. For another model say which: "
            f"cross-encoder:{source} or bi-encoder:{source}."
        ) from None


def _contract(given: str | None) -> ScoringContract | None:
    from inranker_jax.prompts import ScoringContract, preset

    if given is None:
        return None
    if given.endswith(".json") or os.path.exists(given):
        return ScoringContract.from_dict(read_json(paths.local_copy(given)))
    return preset(given)


def _mesh(sizes: dict[str, int]) -> Mesh | None:
    """The mesh over this process's devices; None for one device."""
    import jax

    from inranker_jax.partitioning import make_mesh

    if not sizes and (jax.default_backend() == "cpu" or jax.local_device_count() == 1):
        return None
    # Other processes label chunks of their own, with their own devices.
    return make_mesh(**{"data": -1 if -1 not in sizes.values() else 1, **sizes}, devices=jax.local_devices())
