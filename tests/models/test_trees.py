"""Flat paths and the comparison of two trees."""

from __future__ import annotations

from inranker_jax.models import trees


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = trees.flatten(tree)
    assert flat == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert trees.unflatten(flat) == tree


def test_equal_trees_have_no_mismatch():
    assert trees.mismatch({"a": (1, 2)}, {"a": (1, 2)}) == ""


def test_mismatch_marks_what_is_missing_unexpected_and_misshaped():
    expected = {name: (1,) for name in "abcdefgh"} | {"k": (2, 3)}
    found = {name: (1,) for name in "abcdefg"} | {"k": (3, 2), "z": ()}
    assert trees.mismatch(expected, found).splitlines() == [
        "  a (1,)",
        "  ... 5 equal ...",
        "  g (1,)",
        "- h (1,)",
        "- k (2, 3)",
        "+ k (3, 2)",
        "+ z ()",
    ]
