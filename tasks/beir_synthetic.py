"""Synthetic soft labels on the 16 BEIR sets: the thesis's second phase, and its ablations by name.

Label each set with `python -m inranker_jax.label --output_dir=$INRANKER_DATA_DIR/beir_synthetic/SET`, where SET
is BEIR's name (`trec-covid`, `webis-touche2020`, ...) and the queries are those of
`python -m inranker_jax.generate_queries`. Names: a task `beir_synthetic_{set}` for each (with `_` for `-`), the
mixtures `beir_synthetic_all` and `beir_synthetic_sample_set_1` and `_2` (thesis, Table 2); all of them also
with `_lists`, ten documents together. A mixture's rates are its tasks' sizes, unless gin gives others
(`train.mixture_rates`). One query in a thousand is in split `validation`.

InRanker's published file of the same kind is the task `inranker_beir` (`tasks/inranker_beir.py`).
"""

from __future__ import annotations

from inranker_jax.tasks import label_folders

DATASETS = (
    "trec-covid",
    "nfcorpus",
    "bioasq",
    "nq",
    "hotpotqa",
    "climate-fever",
    "dbpedia-entity",
    "trec-news",
    "robust04",
    "arguana",
    "webis-touche2020",
    "quora",
    "scidocs",
    "scifact",
    "fiqa",
    "signal1m",
)
SAMPLE_SET_1 = ("nfcorpus", "nq", "hotpotqa", "dbpedia-entity", "quora", "scidocs", "fiqa", "signal1m")
SAMPLE_SET_2 = ("trec-covid", "bioasq", "nq", "hotpotqa", "robust04", "scidocs", "scifact", "fiqa")
SETS = {"all": DATASETS, "sample_set_1": SAMPLE_SET_1, "sample_set_2": SAMPLE_SET_2}


def register_sets(kind: str, hint: str) -> None:
    """Registers the tasks of all sets below `$INRANKER_DATA_DIR/{kind}`, and the mixtures of `SETS`.

    Args:
      kind: `beir_synthetic` or another folder of the same layout.
      hint: flags of `python -m inranker_jax.label` which make one of its folders, for the error.
    """
    names = {dataset: label_folders.register_data_folder(kind, dataset, hint=hint) for dataset in DATASETS}
    for suffix, datasets in SETS.items():
        label_folders.register_mixture(f"{kind}_{suffix}", [names[dataset] for dataset in datasets])


register_sets(
    "beir_synthetic",
    "--queries=SYNTHETIC_QUERIES --corpus=BEIR_FOLDER --candidates=RUN --teacher=CKPT",
)
