"""Writes a trained model as a Hugging Face folder.

python -m inranker_jax.export --checkpoint=outputs/run --output_dir=exports/run --dtype=bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from inranker_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses flags and exports. Bad input ends the program with one message and status 2."""
    parser = argparse.ArgumentParser(prog="python -m inranker_jax.export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="training output folder, one of its checkpoints, Hugging Face folder or hub id",
    )
    parser.add_argument(
        "--output_dir", required=True, help="folder to write; an earlier export in it is replaced"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored weights"
    )
    parser.add_argument(
        "--max_shard_gb", type=float, default=5.0, help="largest size of one weight file, in 1e9 bytes"
    )
    flags = parser.parse_args(arguments)
    try:
        export(flags.checkpoint, flags.output_dir, flags.dtype, flags.max_shard_gb * 1e9)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(
        f"Wrote {flags.output_dir}: load it with transformers, or with inranker_jax.Reranker.from_pretrained."
    )


def export(checkpoint: str, output_dir: str, dtype: str = "float32", max_shard_bytes: float = 5e9) -> None:
    """Reads any checkpoint and writes it in Hugging Face's layout, with its tokenizer and scoring contract.

    Args:
      checkpoint: anything that `checkpoints.load_model` reads.
      output_dir: folder to write.
      dtype: "float32" or "bfloat16".
      max_shard_bytes: largest size of one weight file.

    Raises:
      InputError: where the checkpoint cannot be read or the folder must not be replaced.
    """
    from inranker_jax.checkpoints import huggingface, load_model

    model = load_model(checkpoint)
    huggingface.save(
        output_dir, model.config, model.params, model.tokenizer, model.contract, dtype, max_shard_bytes
    )


if __name__ == "__main__":
    main()
