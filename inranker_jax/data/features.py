"""What a SeqIO task of this project yields: one query with a list of documents and their labels, as text.

Text rather than token ids, so that one label set serves every vocabulary and scoring contract; tokens are
made by `ScoringContract.encode` when a batch is made. One example, as NumPy sees it:

    query_id        b"q7"
    query           b"capital of peru"
    document_ids    [b"12", b"3"]
    documents       [b"Lima is the capital of Peru.", b"Cusco lies in the Andes."]
    teacher_logits  [[-2.1, 2.1], [0.4, -0.4]]   float32 [L, 2], raw, in the order [false, true]
    relevance       [1.0, 0.0]                   float32 [L]: 1, 0, or -1 where it is not known

`teacher_logits` may be left out by a task for hard labels, `relevance` by a task that knows none. Tasks of
one mixture must have the same features.

The dataset has one feature more, `example_number` (int64), the example's place in its split, so that offline
caching can be undone in order (see `sources.LabelledPairs`).
"""

from __future__ import annotations

import seqio
import tensorflow as tf

_TEXT = seqio.PassThroughVocabulary(size=0)


def _text(rank: int) -> seqio.Feature:
    return seqio.Feature(vocabulary=_TEXT, add_eos=False, dtype=tf.string, rank=rank)


OUTPUT_FEATURES: dict[str, seqio.Feature] = {
    "query_id": _text(0),
    "query": _text(0),
    "document_ids": _text(1),
    "documents": _text(1),
    "teacher_logits": seqio.ContinuousFeature(dtype=tf.float32, rank=2, required=False),
    "relevance": seqio.ContinuousFeature(dtype=tf.float32, rank=1, required=False),
}
"""The `output_features` of a task."""

SIGNATURE: dict[str, tf.TensorSpec] = {
    "query_id": tf.TensorSpec([], tf.string),
    "query": tf.TensorSpec([], tf.string),
    "document_ids": tf.TensorSpec([None], tf.string),
    "documents": tf.TensorSpec([None], tf.string),
    "teacher_logits": tf.TensorSpec([None, 2], tf.float32),
    "relevance": tf.TensorSpec([None], tf.float32),
    "example_number": tf.TensorSpec([], tf.int64),
}
"""The element signature of a `tf.data.Dataset` of such examples."""
