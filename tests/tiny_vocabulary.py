"""Trains a small SentencePiece vocabulary, so that tests of text need neither the hub nor real files."""

from __future__ import annotations

import functools
import inspect
import io
import pathlib
import textwrap

import sentencepiece

_PORTUGUESE = """
Pergunta: Documento: Relevante: Não Sim. A reclassificação de passagens ordena os documentos encontrados
por um método rápido, como o BM25, segundo a relevância para a pergunta. O coração do método é a destilação:
um modelo pequeno aprende com as pontuações de um modelo grande. Não há informação suficiente para a questão.
""".strip()


@functools.cache
def _model(size: int) -> bytes:
    text = " ".join(inspect.getdoc(module) or "" for module in (inspect, textwrap, io, pathlib, functools))
    sources = "".join(inspect.getsource(module) for module in (textwrap, io))
    lines = [line for line in (text + sources + _PORTUGUESE).splitlines() if line.strip()]
    lines += ["Query: what is true Document: this is false Relevant: true false yes no não sim Não Sim"] * 20
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=size,
        model_type="unigram",
        character_coverage=1.0,
        # T5's layout: <pad> 0, </s> 1, <unk> 2, no <s>.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()


def write_spiece(folder: pathlib.Path, size: int = 400) -> pathlib.Path:
    """Writes `spiece.model` with `size` pieces into `folder`, creating it, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_model(size))
    return folder
