"""A corpus of my own: labels in InRanker's TSV, queries and documents as `id<tab>text`."""

import seqio

from inranker_jax.corpora import inranker
from inranker_jax.data import OUTPUT_FEATURES, LabelledPairs

FILES = ["labels.tsv", "queries.tsv", "collection.tsv"]


def read_pairs():
    return inranker.read_msmarco_tsv(*FILES, on_error="skip")


seqio.TaskRegistry.add(
    "my_corpus",
    source=LabelledPairs(read_pairs, files=FILES, list_size=10, validation_fraction=0.1),
    preprocessors=[seqio.CacheDatasetPlaceholder()],
    output_features=OUTPUT_FEATURES,
)
