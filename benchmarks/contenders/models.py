"""The one model that all contenders load, in the form that each of them reads.

    python -m contenders.models transformers t5-small FOLDER
    python -m contenders.models ctranslate2 SOURCE FOLDER
    python -m contenders.models onnx SOURCE FOLDER

Weights are random, from a fixed seed: speed and memory do not depend on them, and equal scores are as telling. Each
form is made in a process of its own, so that no contender has a second library's threads beside its own.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

from . import flops

SEED = 0
VOCABULARY = 32128
# ▁false and ▁true in T5's vocabulary.
LABEL_IDS = (6136, 1176)

SHAPES = {
    "micro": flops.Shape(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2
    ),
    "tiny": flops.Shape(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
    ),
    "t5-small": flops.Shape(
        vocab_size=VOCABULARY, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8
    ),
    "t5-base": flops.Shape(
        vocab_size=VOCABULARY, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
    ),
}  # fmt: skip


class Names:
    """Stands in for a tokenizer when CTranslate2 converts: a name for each id, so that no vocabulary is needed."""

    pad_token, eos_token, unk_token = "<pad>", "</s>", "<unk>"

    def __init__(self, size: int = VOCABULARY) -> None:
        special = [self.pad_token, self.eos_token, self.unk_token]
        self.names = [*special, *(f"<{number}>" for number in range(len(special), size))]

    def get_vocab(self) -> dict[str, int]:
        """Names to ids."""
        return {name: number for number, name in enumerate(self.names)}

    def convert_ids_to_tokens(self, number: int) -> str:
        """The name of an id."""
        return self.names[number]


def write_transformers(shape: str, folder: pathlib.Path) -> None:
    """A `T5ForConditionalGeneration` in safetensors. Without dropout, so that losses can be compared."""
    import dataclasses

    import torch
    import transformers

    torch.manual_seed(SEED)
    settings = dataclasses.asdict(SHAPES[shape]) | {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    config = transformers.T5Config(**settings)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def write_ctranslate2(source: pathlib.Path, folder: pathlib.Path) -> None:
    """CTranslate2's form, float32; it is narrowed to int8 when it is loaded."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: object, **__: object) -> Names:
            return Names()

    Converter(str(source)).convert(str(folder), force=True)


def write_onnx(source: pathlib.Path, folder: pathlib.Path) -> None:
    """`float32.onnx` and `int8.onnx` (dynamic quantisation): ids and mask in, the two label logits out."""
    import torch
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = transformers.T5ForConditionalGeneration.from_pretrained(source, attn_implementation="eager")

    class LabelLogits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            start = torch.zeros_like(input_ids[:, :1])
            found = self.model(
                input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start, use_cache=False
            )
            return found.logits[:, 0][:, list(LABEL_IDS)]

    ids = torch.randint(3, 1000, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    rows_and_length = {0: "rows", 1: "length"}
    with torch.inference_mode():
        torch.onnx.export(
            LabelLogits(),
            (ids, mask),
            str(folder / "float32.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={
                "input_ids": rows_and_length,
                "attention_mask": rows_and_length,
                "logits": {0: "rows"},
            },
        )
    quantize_dynamic(str(folder / "float32.onnx"), str(folder / "int8.onnx"), weight_type=QuantType.QInt8)


def main() -> None:
    """Writes one form; the folder appears complete or not at all."""
    form, source, target = sys.argv[1:]
    folder = pathlib.Path(target)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if form == "transformers":
        write_transformers(source, partial)
    elif form == "ctranslate2":
        write_ctranslate2(pathlib.Path(source), partial)
    else:
        write_onnx(pathlib.Path(source), partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
