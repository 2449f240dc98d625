"""Presets against the rows of compatibility.md."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax.errors import InputError
from inranker_jax.prompts import PRESETS, Tokenizer, preset, preset_for_model
from tests.prompts.conftest import folder_for

ENGLISH = "Query: Q Document: D Relevant:"
ROWS = {
    "monot5": (ENGLISH, ("▁false", "▁true"), True, "suffix_safe", "logit_difference"),
    "inranker": (ENGLISH, ("▁false", "▁true"), True, "suffix_safe", "logit_difference"),
    "inranker_paper_inference": (ENGLISH, ("▁false", "▁true"), True, "longest_first", "probability"),
    "inranker_paper_training": (ENGLISH, ("▁false", "▁true"), False, "paper_training", "logit_difference"),
    "mt5_base_mmarco": (ENGLISH, ("▁no", "▁yes"), True, "suffix_safe", "logit_difference"),
    "mt5_3b_mmarco": (ENGLISH, ("▁", "▁true"), True, "suffix_safe", "logit_difference"),
    "ptt5_msmarco": (ENGLISH, ("▁não", "▁sim"), True, "suffix_safe", "logit_difference"),
    "monoptt5": (
        "Pergunta: Q Documento: D Relevante:",
        ("▁Não", "▁Sim"),
        True,
        "suffix_safe",
        "logit_difference",
    ),
    "rankt5": ("Query: Q Document: D", ("<extra_id_10>",), True, "suffix_safe", "single_logit"),
}


def test_every_row_has_its_preset() -> None:
    found = {
        name: (c.render("Q", "D"), c.label_pieces, c.append_eos, c.truncation, c.score)
        for name, c in PRESETS.items()
    }
    assert found == ROWS
    assert all(contract.name == name and contract.max_length == 512 for name, contract in PRESETS.items())


def test_portuguese_pieces_are_in_the_real_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = Tokenizer.from_pretrained(folder_for("ptt5", tmp_path_factory))
    for name in ("ptt5_msmarco", "monoptt5"):
        ids = preset(name).label_ids(tokenizer)
        assert tuple(tokenizer.id_to_piece(index) for index in ids) == PRESETS[name].label_pieces


def test_unknown_name() -> None:
    assert preset("monot5") is PRESETS["monot5"]
    with pytest.raises(InputError, match=r"preset 'mono_t5'\. Did you mean 'monot5'\?.*Presets: monot5"):
        preset("mono_t5")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("castorini/monot5-base-msmarco-10k", "monot5"),
        ("castorini/monot5-3b-msmarco", "monot5"),
        ("unicamp-dl/InRanker-small", "inranker"),
        ("unicamp-dl/InRanker-3B", "inranker"),
        ("unicamp-dl/mt5-base-mmarco-v2", "mt5_base_mmarco"),
        ("unicamp-dl/mt5-base-en-pt-msmarco-v2", "mt5_base_mmarco"),
        ("unicamp-dl/mt5-3B-mmarco-en-pt", "mt5_3b_mmarco"),
        ("unicamp-dl/mt5-13b-mmarco-100k", "mt5_3b_mmarco"),
        ("unicamp-dl/ptt5-base-pt-msmarco-100k-v2", "ptt5_msmarco"),
        ("unicamp-dl/ptt5-base-en-pt-msmarco-10k-v1", "ptt5_msmarco"),
        ("unicamp-dl/monoptt5-large", "monoptt5"),
        ("Soyoung97/RankT5-base", "rankt5"),
        ("/models/monot5-base/", "monot5"),
        (pathlib.Path("/hub/models--castorini--monot5-base-msmarco/snapshots/abc123"), "monot5"),
        ("google-t5/t5-small", None),
        ("google/mt5-base", None),
        ("unicamp-dl/ptt5-base-portuguese-vocab", None),
        ("/work/monot5-experiments/run1", None),
        ("", None),
    ],
)
def test_family_of_a_model(model: str, expected: str | None) -> None:
    found = preset_for_model(model)
    assert (found and found.name) == expected
