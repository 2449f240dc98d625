"""Teachers: anything that gives a (query, document) pair its logits.

>>> from inranker_jax.labeling.teachers import open_teacher  # doctest: +SKIP
>>> teacher = open_teacher("t5:unicamp-dl/InRanker-base?dtype=bfloat16")  # doctest: +SKIP
>>> for logits in teacher.logits(chunks): ...  # doctest: +SKIP

`spec` has the grammar of the string; optional packages are imported when a teacher that needs them is opened.
"""

from __future__ import annotations

from inranker_jax.labeling.teachers.base import Teacher, check_model, check_path, split_margin
from inranker_jax.labeling.teachers.ensemble import combine, ensemble_identity, parse_weights
from inranker_jax.labeling.teachers.spec import GRAMMAR, KINDS, TeacherSpec, parse_spec

__all__ = [
    "GRAMMAR",
    "KINDS",
    "Teacher",
    "TeacherSpec",
    "check_model",
    "check_path",
    "combine",
    "ensemble_identity",
    "open_teacher",
    "parse_spec",
    "parse_weights",
    "split_margin",
]


def open_teacher(spec: str | TeacherSpec) -> Teacher:
    """Opens a teacher.

    Args:
      spec: `[NAME=][KIND:]PATH[?option=value&...]`, see `spec`, or a parsed one.

    Returns:
      The teacher; its model is in memory, or will be when its identity or logits are asked for.

    Raises:
      InputError: a specification that cannot be read, a model that is not there or does not fit its options,
        or a package that is not installed.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    if parsed.kind == "t5":
        from inranker_jax.labeling.teachers.t5 import T5Teacher

        return T5Teacher(parsed)
    if parsed.kind == "cross-encoder":
        from inranker_jax.labeling.teachers.cross_encoder import CrossEncoderTeacher

        return CrossEncoderTeacher(parsed)
    if parsed.kind == "bi-encoder":
        from inranker_jax.labeling.teachers.bi_encoder import BiEncoderTeacher

        return BiEncoderTeacher(parsed)
    from inranker_jax.labeling.teachers.trec_run import RunTeacher

    return RunTeacher(parsed)
