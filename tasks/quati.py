"""Quati: Portuguese passages with soft labels of your own.

`quati_synthetic`: queries generated over Quati's passages (`quati_1M.tsv` or `quati_10M_part_*.tsv`), labelled
into `$INRANKER_DATA_DIR/quati_synthetic`. `quati_real`: Quati's own topics, labelled into
`$INRANKER_DATA_DIR/quati_real`; a model trained on these has seen the queries on which Quati is evaluated. Both
also with `_lists`, ten documents together. One query in a thousand is in split `validation`.
"""

from __future__ import annotations

from inranker_jax.tasks import label_folders

for kind, queries in (("quati_synthetic", "SYNTHETIC_QUERIES"), ("quati_real", "TOPICS --qrels=QRELS")):
    label_folders.register_data_folder(
        kind, hint=f"--queries={queries} --corpus=quati_1M.tsv --candidates=RUN --teacher=CKPT"
    )
