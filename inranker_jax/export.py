"""Writes a trained model as a Hugging Face folder, or as a checkpoint that T5X reads.

python -m inranker_jax.export --checkpoint=outputs/run --output_dir=exports/run --dtype=bfloat16
python -m inranker_jax.export --checkpoint=outputs/run --output_dir=exports/t5x --format=t5x
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inranker_jax import quiet
from inranker_jax.errors import InputError
from inranker_jax.flags import Parser

FORMATS = ("huggingface", "t5x")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses flags and exports. Bad input ends it with one message and status 2, a failing disk or store with 1."""
    parser = Parser("export", __doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="training output folder, one of its checkpoints, T5X checkpoint, Hugging Face folder or hub id",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder to write; an earlier export in it is replaced (t5x: of the same step)",
    )
    parser.add_argument("--format", default="huggingface", choices=FORMATS, help="what to write")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored weights"
    )
    parser.add_argument(
        "--max_shard_gb", type=float, help="huggingface: largest size of one weight file, in 1e9 bytes (5)"
    )
    parser.add_argument(
        "--step", type=int, help="t5x: the checkpoint's step; the run's own by default, 0 where there is none"
    )
    parser.add_argument(
        "--scan_layers", action="store_true", help="t5x: layers stacked, for networks of examples/scalable_t5"
    )
    quiet.libraries()
    try:
        flags = parser.parse(arguments)
        if flags.format == "t5x":
            if flags.max_shard_gb is not None:
                raise InputError(
                    "--max_shard_gb is of --format=huggingface. T5X keeps every array in chunks."
                )
            written = export_t5x(
                flags.checkpoint, flags.output_dir, flags.dtype, flags.step, flags.scan_layers
            )
            told = (
                f"Wrote {written}: T5X's INITIAL_CHECKPOINT_PATH (docs/t5x.md), or an --init_checkpoint here."
            )
        else:
            if flags.step is not None or flags.scan_layers:
                raise InputError("--step and --scan_layers are of --format=t5x.")
            shard = 5e9 if flags.max_shard_gb is None else flags.max_shard_gb * 1e9
            export(flags.checkpoint, flags.output_dir, flags.dtype, shard)
            told = (
                f"Wrote {flags.output_dir}: load it with transformers, or with "
                "inranker_jax.Reranker.from_pretrained."
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:  # a full disk, a store that did not answer or that may only be read
        print(f"error: the export to {flags.output_dir} was not finished: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(told)


def export(checkpoint: str, output_dir: str, dtype: str = "float32", max_shard_bytes: float = 5e9) -> None:
    """Reads any checkpoint and writes it in another layout, with its tokenizer and scoring contract.

    Args:
      checkpoint: anything that `checkpoints.load_model` reads.
      output_dir: folder to write.
      dtype: "float32" or "bfloat16".
      max_shard_bytes: largest size of one weight file.

    Raises:
      InputError: where the checkpoint cannot be read or the folder must not be replaced.
      OSError: the disk or the store did not take all of it.
    """
    from inranker_jax.checkpoints import huggingface, load_model

    model = load_model(checkpoint)
    huggingface.save(
        output_dir, model.config, model.params, model.tokenizer, model.contract, dtype, max_shard_bytes
    )


def export_t5x(
    checkpoint: str,
    output_dir: str,
    dtype: str = "float32",
    step: int | None = None,
    scan_layers: bool = False,
) -> str:
    """Reads any checkpoint and writes it as one of T5X; see `checkpoints.t5x_save.save`.

    Args:
      checkpoint: anything that `checkpoints.load_model` reads.
      output_dir: folder to write `checkpoint_STEP` into.
      dtype: "float32" or "bfloat16".
      step: None for the step of the checkpoint that was read; 0 where it has none.
      scan_layers: write stacked layers, as `scalable_t5` has them.

    Returns:
      The folder of the step.

    Raises:
      InputError: where the checkpoint cannot be read, T5X has no such model, or the folder is another one's.
      OSError: the disk or the store did not take all of it.
    """
    from inranker_jax.checkpoints import folders, load_model, t5x_save

    model = load_model(checkpoint, on_host=True)
    if step is None:
        located = folders.locate_run(model.source) if model.step is None else None
        step = model.step if model.step is not None else (located[1] if located else None)
    written = t5x_save.save(
        output_dir,
        model.config,
        model.params,
        step or 0,
        model.tokenizer,
        model.contract,
        dtype,
        scan_layers,
    )
    return str(written)


if __name__ == "__main__":
    main()
