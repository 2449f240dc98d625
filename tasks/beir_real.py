"""Soft labels of the real BEIR queries: the upper bound of the thesis (Table 10).

The thesis repeated its second phase with the evaluation queries in place of the synthetic ones. A model that
is trained on these has seen the queries of BEIR's test sets: its scores on the sets it was trained on are no
estimate of anything but that bound.

Label each set with `python -m inranker_jax.label --output_dir=$INRANKER_DATA_DIR/beir_real/SET`. Names as in
`tasks/beir_synthetic.py`: `beir_real_{set}`, `beir_real_all`, `beir_real_sample_set_1` and `_2`, each also with
`_lists`. Sets have few queries: one alone may have none in split `validation` (one query in a thousand).
"""

from __future__ import annotations

from inranker_jax.tasks import beir_synthetic

beir_synthetic.register_sets(
    "beir_real", "--queries=BEIR_FOLDER --qrels=QRELS --corpus=BEIR_FOLDER --candidates=RUN --teacher=CKPT"
)
