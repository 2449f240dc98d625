"""The contracts of published rerankers: what each family was trained to read and to answer.

Every published row is a template and label pieces; the default truncation is `suffix_safe` for all of them,
which differs from the originals only for pairs longer than the limit. `inranker_paper_inference` and
`inranker_paper_training` reproduce InRanker's own scripts exactly, over-long pairs included.
"""

from __future__ import annotations

import re

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.prompts.contract import ScoringContract

_ENGLISH = "Query: {query} Document: {document} Relevant:"
_PORTUGUESE = "Pergunta: {query} Documento: {document} Relevante:"

_ROWS = (
    ScoringContract(_ENGLISH, ("▁false", "▁true"), name="monot5"),
    ScoringContract(_ENGLISH, ("▁false", "▁true"), name="inranker"),
    ScoringContract(
        _ENGLISH,
        ("▁false", "▁true"),
        truncation="longest_first",
        score="probability",
        name="inranker_paper_inference",
    ),
    ScoringContract(
        _ENGLISH,
        ("▁false", "▁true"),
        append_eos=False,
        truncation="paper_training",
        name="inranker_paper_training",
    ),
    ScoringContract(_ENGLISH, ("▁no", "▁yes"), name="mt5_base_mmarco"),
    ScoringContract(_ENGLISH, ("▁", "▁true"), name="mt5_3b_mmarco"),
    ScoringContract(_ENGLISH, ("▁não", "▁sim"), name="ptt5_msmarco"),
    ScoringContract(_PORTUGUESE, ("▁Não", "▁Sim"), name="monoptt5"),
    ScoringContract(
        "Query: {query} Document: {document}", ("<extra_id_10>",), score="single_logit", name="rankt5"
    ),
)

PRESETS: dict[str, ScoringContract] = {contract.name: contract for contract in _ROWS}

# Read from the top; the first pattern found in the lower-cased model name decides.
_FAMILIES = (
    (r"monoptt5", "monoptt5"),
    (r"ptt5-.*ms-?marco", "ptt5_msmarco"),
    (r"mt5-(3b|13b)-.*marco", "mt5_3b_mmarco"),
    (r"mt5-base-.*marco", "mt5_base_mmarco"),
    (r"inranker", "inranker"),
    (r"rankt5", "rankt5"),
    (r"monot5", "monot5"),
)


def preset(name: str) -> ScoringContract:
    """Returns a preset contract.

    Args:
      name: a key of `PRESETS`.

    Returns:
      The contract.

    Raises:
      InputError: there is no such preset; the message lists them.

    >>> preset("monot5").label_pieces
    ('▁false', '▁true')
    """
    if name not in PRESETS:
        raise InputError(
            f"there is no scoring preset {name!r}.{did_you_mean(str(name), PRESETS)} "
            f"Presets: {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def preset_for_model(hub_id_or_path: str) -> ScoringContract | None:
    """Finds the preset of a published model by its name.

    Args:
      hub_id_or_path: `owner/name` or a local folder. Only the model's own name is read: the last part of the
        path, or the `models--owner--name` part inside a hub cache.

    Returns:
      The contract, or None when the name belongs to no known family (a plain T5, for example).

    >>> preset_for_model("unicamp-dl/InRanker-base").name
    'inranker'
    >>> preset_for_model("google-t5/t5-small") is None
    True
    """
    parts = [part for part in re.split(r"[/\\]", str(hub_id_or_path)) if part]
    if not parts:
        return None
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    name = (cached or parts)[-1].lower()
    for pattern, preset_name in _FAMILIES:
        if re.search(pattern, name):
            return PRESETS[preset_name]
    return None
