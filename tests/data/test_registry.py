"""Real SeqIO tasks and mixtures, from registration to batches."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from inranker_jax import data
from inranker_jax.data import rates
from inranker_jax.data.shares import query_share
from inranker_jax.data.sources import group_pairs, original_error
from inranker_jax.errors import InputError
from inranker_jax.prompts import ScoringContract, Tokenizer
from inranker_jax.records import LabelledPair

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")
tf = pytest.importorskip("tensorflow")
registry = pytest.importorskip("inranker_jax.data.registry")
NAMES = (f"registry_test_{number}" for number in itertools.count())


def pairs(queries: int = 40, documents: int = 5, word: str = "query") -> Iterator[LabelledPair]:
    for query in range(queries):
        for place in range(documents):
            margin = 2.0 + query / 10 if place == 0 else -1.0 - place
            yield LabelledPair(
                f"q{query}", f"d{query}.{place}", f"{word} {query}", f"document {place}", (-margin, margin)
            )


def examples(task: Any, split: str, **arguments: Any) -> list[Any]:
    return list(registry.read_examples(task, split, **arguments))


def test_the_dataset_yields_the_documented_features() -> None:
    name = next(NAMES)
    data.add_labelled_task(name, pairs, list_size=3, relevance="first")
    dataset = seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split="train", shuffle=False)
    assert set(dataset.element_spec) == {*data.OUTPUT_FEATURES, "example_number"}
    first, second, third = itertools.islice(dataset.as_numpy_iterator(), 3)
    assert (first["query_id"], first["query"]) == (b"q0", b"query 0")
    assert first["document_ids"].tolist() == [b"d0.0", b"d0.1", b"d0.2"]
    assert first["documents"].tolist() == [b"document 0", b"document 1", b"document 2"]
    np.testing.assert_array_equal(first["teacher_logits"], np.float32([[-2, 2], [2, -2], [3, -3]]))
    assert first["teacher_logits"].dtype == np.float32
    assert first["relevance"].tolist() == [1, 0, 0]
    assert second["document_ids"].tolist() == [b"d0.3", b"d0.4"]
    assert second["relevance"].tolist() == [0, 0]
    assert third["query_id"] == b"q1"


def test_reading_past_tensorflow_gives_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    task = data.add_labelled_task(next(NAMES), pairs, list_size=3, relevance="first", validation_fraction=0.3)
    for split in ("train", "validation"):
        direct = examples(task, split)
        monkeypatch.setattr(registry.sources, "LabelledPairs", type("Another", (), {}))
        through_seqio = examples(task, split)
        monkeypatch.undo()
        assert [example.to_bytes() for example in direct] == [e.to_bytes() for e in through_seqio]
        assert direct


@pytest.mark.parametrize(("list_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (10, [5])])
def test_pairs_are_grouped_by_query(list_size: int, sizes: list[int]) -> None:
    groups = list(group_pairs(pairs(queries=3), list_size))
    assert [len(group["documents"]) for group in groups] == sizes * 3
    assert [document for group in groups for document in group["document_ids"]] == [
        pair.document_id for pair in pairs(queries=3)
    ]
    assert all(group["relevance"].tolist() == [-1] * len(group["documents"]) for group in groups)


def test_relevance_from_a_function() -> None:
    task = data.add_labelled_task(
        next(NAMES), pairs, list_size=5, relevance=lambda pair: float(pair.document_id.endswith("2"))
    )
    assert all(example.relevance.tolist() == [0, 0, 1, 0, 0] for example in examples(task, "train"))


def test_splits_share_no_query_and_lose_none() -> None:
    def shouted() -> Iterator[LabelledPair]:
        for pair in pairs():
            yield pair
            yield LabelledPair(
                "x" + pair.query_id, pair.document_id, pair.query.upper() + " ", "d", pair.logits
            )

    found: dict[tuple[str, int], set[str]] = {}
    for list_size in (1, 10):
        task = data.add_labelled_task(next(NAMES), shouted, list_size=list_size, validation_fraction=0.25)
        for split in task.splits:
            queries = {" ".join(example.query.lower().split()) for example in examples(task, split)}
            found[split, list_size] = queries
        assert not found["train", list_size] & found["validation", list_size]
        assert len(found["train", list_size] | found["validation", list_size]) == 40
    assert found["validation", 1] == found["validation", 10]
    assert 3 <= len(found["validation", 1]) <= 17


def test_query_share_is_uniform_and_fixed() -> None:
    shares = np.asarray([query_share(f"query {number}") for number in range(4000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert query_share("What  is\tJAX") == query_share("what is jax ")
    assert query_share("what is jax") == pytest.approx(0.6523884001692595, abs=1e-12)


def test_named_splits_have_their_own_readers() -> None:
    task = data.add_labelled_task(next(NAMES), {"train": lambda: pairs(3), "validation": lambda: pairs(2)})
    assert [len(examples(task, split)) for split in ("train", "validation")] == [15, 10]


def test_an_error_in_a_reader_surfaces_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[LabelledPair]:
        yield next(pairs())
        raise InputError.at("labels.tsv", 2, "3 columns", "four")

    def buggy() -> Iterator[LabelledPair]:
        yield next(pairs())
        raise KeyError("no such thing")

    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(registry.sources, "LabelledPairs", type("Another", (), {}))
        with pytest.raises(InputError, match=r"^labels\.tsv:2: 3 columns\. Expected four\.$") as caught:
            examples(seqio.TaskRegistry.get(register(broken)), "train")
        assert caught.value.__cause__ is None
        with pytest.raises(KeyError, match="no such thing"):
            examples(seqio.TaskRegistry.get(register(buggy)), "train")
        monkeypatch.undo()
    assert original_error(ValueError("labels.tsv:2: another")) is None


def register(read: Callable[[], Iterator[LabelledPair]]) -> str:
    """A task with a step of the user's own: its examples come through tf.data."""
    name = next(NAMES)
    seqio.TaskRegistry.add(
        name,
        source=data.LabelledPairs(read),
        preprocessors=[seqio.CacheDatasetPlaceholder(), lambda dataset: dataset.map(lambda example: example)],
        output_features=data.OUTPUT_FEATURES,
    )
    return name


def test_a_task_of_plain_seqio_parts(
    tmp_path: pathlib.Path, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "lines.tsv"
    path.write_text("".join(f"query {n}\tdocument {n}\t{n}.5\t-{n}.5\n" for n in range(6)))

    @seqio.map_over_dataset
    def parse(line: Any) -> dict[str, Any]:
        fields = tf.strings.split(line, "\t")
        logits = tf.strings.to_number(fields[2:])
        return {
            "query_id": fields[0],
            "query": fields[0],
            "document_ids": fields[1:2],
            "documents": fields[1:2],
            "teacher_logits": logits[tf.newaxis, ::-1],
        }

    name = next(NAMES)
    seqio.TaskRegistry.add(
        name,
        source=seqio.TextLineDataSource({"train": str(path)}),
        preprocessors=[parse, seqio.CacheDatasetPlaceholder()],
        output_features=data.OUTPUT_FEATURES,
    )
    with data.open_stream(
        name, contract=contract, tokenizer=tokenizer, batch_size=6, cache_dir=tmp_path
    ) as stream:
        batch = next(stream)
    assert sorted(query for query, _ in batch.examples) == [f"query {n}" for n in range(6)]
    for row, (query, _) in enumerate(batch.examples):
        number = float(query.split()[1])
        assert batch["teacher_logits"][row, 0].tolist() == [-number - 0.5, number + 0.5]
    assert (batch["relevance"] == -1).all()

    path.write_text("query\tdocument\t1.5\tnot-a-number\n")
    with pytest.raises(InputError, match=f"{name}:train: SeqIO failed after 0 examples: .*not-a-number"):
        data.open_stores(name, cache_dir=tmp_path)


def test_bad_features_of_a_task_are_named() -> None:
    name = next(NAMES)
    data.add_labelled_task(
        name, lambda: iter([LabelledPair("q", "d", "query", "document", (float("nan"), 1.0))])
    )
    with pytest.raises(InputError, match=f"{name}:train, example 0: feature 'teacher_logits' holds NaN"):
        data.open_stores(name)


def test_a_mixture_and_its_rates(
    tmp_path: pathlib.Path, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    first, second, mixture, outer = (next(NAMES) for _ in range(4))
    data.add_labelled_task(first, lambda: pairs(8), list_size=5)
    held_out = functools.partial(pairs, 3, word="question")
    data.add_labelled_task(second, {"train": lambda: pairs(50), "validation": held_out}, list_size=2)
    seqio.MixtureRegistry.add(mixture, [(first, 3), (second, 1)])
    stores, rates = data.open_stores(mixture, cache_dir=tmp_path)
    assert [store.name for store in stores] == [f"{first}:train", f"{second}:train"]
    assert rates == [3, 1]
    arguments: dict[str, Any] = {"contract": contract, "tokenizer": tokenizer, "cache_dir": tmp_path}
    with data.open_stream(mixture, batch_size=16, **arguments) as stream:
        for batch in itertools.islice(stream, 12):
            assert batch["tokens"].shape[:2] == (16, 5)
            assert sorted(batch["list_mask"].sum(1).tolist())[-12:] == [5] * 12
    # Splits that only some tasks have come from those tasks, as in SeqIO.
    with data.open_stream(mixture, "validation", batch_size=4, **arguments) as stream:
        assert stream.num_batches == 3
        assert [row[0] for batch in stream for row in batch.examples if row[0]] == ["q0"] * 3 + ["q1"] * 3 + [
            "q2"
        ] * 3
    seqio.MixtureRegistry.add(outer, [(mixture, 2), (second, 2)])
    assert data.open_stores(outer, cache_dir=tmp_path)[1] == [1.5, 2.5]
    # SeqIO's own function of a task's size works too.
    by_size = next(NAMES)
    seqio.MixtureRegistry.add(by_size, [first, second], default_rate=seqio.mixing_rate_num_examples)
    assert data.open_stores(by_size, cache_dir=tmp_path)[1] == [8, 150]


def test_rates_are_proportional_or_the_users(tmp_path: pathlib.Path) -> None:
    small, large, plain, mixture = (next(NAMES) for _ in range(4))
    data.add_labelled_task(small, lambda: pairs(4), list_size=5)
    data.add_labelled_task(large, lambda: pairs(25), list_size=5)
    seqio.MixtureRegistry.add(mixture, [small, large], default_rate=rates.proportional)

    def rates_of(name: str = mixture, **arguments: Any) -> list[float] | None:
        return data.open_stores(name, cache_dir=tmp_path, **arguments)[1]

    assert rates_of() == [4, 25]
    assert rates_of(rates=data.temperature(2.0)) == [2, 5]
    assert rates_of(rates=data.temperature(1.0, maximum=10)) == [4, 10]
    assert rates_of(rates=rates.equal) == [1, 1]
    assert rates_of(rates={small: 3, large: 0.5}) == [3, 0.5]
    assert rates_of(small, rates=data.temperature(2.0)) is None
    # SeqIO asks the tasks itself.
    provider = seqio.get_mixture_or_task(mixture)
    assert [provider.get_rate(task) for task in provider.tasks] == [4, 25]
    for bad, words in (
        ({small: 1}, f"no rate for {large}"),
        ({small: 1, large: 1, "x" + small: 1}, f"Did you mean '{small}'"),
        ({small: 0, large: 1}, f"rates: 0 for {small}. Expected a positive"),
        (lambda size: float("inf"), "Expected a positive finite number"),
    ):
        with pytest.raises(InputError, match=words):
            rates_of(rates=bad)
    with pytest.raises(InputError, match="is a single task"):
        rates_of(small, rates={small: 1})
    seqio.TaskRegistry.add(
        plain,
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features=data.OUTPUT_FEATURES,
    )
    with pytest.raises(InputError, match=f"number of examples of task {plain} is not known"):
        rates.proportional(seqio.TaskRegistry.get(plain))


def test_a_mixture_skips_empty_splits_and_refuses_two_divisions(tmp_path: pathlib.Path) -> None:
    one, many, other, mixture, mixed = (next(NAMES) for _ in range(5))
    data.add_labelled_task(one, lambda: pairs(1), list_size=5, validation_fraction=0.2)
    data.add_labelled_task(many, lambda: pairs(40), list_size=5, validation_fraction=0.2)
    data.add_labelled_task(other, lambda: pairs(40), list_size=5, validation_fraction=0.3)
    seqio.MixtureRegistry.add(mixture, [one, many], default_rate=rates.proportional)
    stores, given = data.open_stores(mixture, "validation", cache_dir=tmp_path)
    assert [store.name for store in stores] == [f"{many}:validation"]
    assert given == [len(stores[0])]
    by_name = {one: 1, many: 2}
    assert data.open_stores(mixture, "validation", cache_dir=tmp_path, rates=by_name)[1] == [2]
    with pytest.raises(
        InputError, match=r"has one query, which is on the other side.*validation_split = None"
    ):
        data.open_stores(one, "validation", cache_dir=tmp_path)
    nothing = next(NAMES)
    data.add_labelled_task(nothing, lambda: pairs(0), list_size=5, validation_fraction=0.2)
    seqio.MixtureRegistry.add(f"{nothing}_mixture", [nothing, many], default_rate=1)
    with pytest.raises(InputError, match=f"{nothing}:train holds no examples. Expected at least one"):
        data.open_stores(f"{nothing}_mixture", cache_dir=tmp_path)
    seqio.MixtureRegistry.add(mixed, [many, other], default_rate=1)
    with pytest.raises(InputError, match=f"different validation fractions .0.2 in {many}, 0.3 in {other}"):
        data.open_stores(mixed, cache_dir=tmp_path)


def test_a_mixture_refuses_to_validate_on_what_another_task_trains_on(tmp_path: pathlib.Path) -> None:
    def validate(*members: str) -> set[str]:
        mixture = next(NAMES)
        seqio.MixtureRegistry.add(mixture, list(members), default_rate=1)
        data.open_stores(mixture, "train", cache_dir=tmp_path)
        stores, _ = data.open_stores(mixture, "validation", cache_dir=tmp_path)
        return {store[number].query for store in stores for number in range(len(store))}

    divided, alike, same, other, own = (next(NAMES) for _ in range(5))
    data.add_labelled_task(divided, pairs, validation_fraction=0.2)
    data.add_labelled_task(alike, lambda: pairs(30), list_size=5, validation_fraction=0.2)
    # Queries are the same whatever their case and spacing.
    data.add_labelled_task(same, lambda: pairs(word=" Query"))
    data.add_labelled_task(other, lambda: pairs(word="question"))
    held_out = functools.partial(pairs, 2, word="question")
    data.add_labelled_task(own, {"train": lambda: pairs(3, word="third"), "validation": held_out})
    validated = validate(divided, alike, own)
    assert validated == validate(divided, other) | {"question 0", "question 1"}
    for members, words in (
        (
            (divided, same),
            f"' Query [0-9]+' is in split 'validation' of {divided} and in split 'train' of {same}",
        ),
        ((own, other), f"'question 0' is in split 'validation' of {own} and in split 'train' of {other}"),
    ):
        with pytest.raises(InputError, match=words + r".*validation_split = None"):
            validate(*members)


def test_an_empty_split_says_which_fraction_fills_it(tmp_path: pathlib.Path) -> None:
    shares = sorted(query_share(f"query {number}") for number in range(6))
    for split, fraction in (("validation", shares[0] / 2), ("train", (1 + shares[-1]) / 2)):
        name, repaired = next(NAMES), next(NAMES)
        data.add_labelled_task(name, lambda: pairs(6), validation_fraction=fraction)
        with pytest.raises(
            InputError, match=rf"^{name}:{split} holds no examples: .*all of its 6 queries"
        ) as caught:
            data.open_stores(name, split, cache_dir=tmp_path)
        (advice,) = re.findall(r"Register the task with validation_fraction=(\S+)", str(caught.value))
        data.add_labelled_task(repaired, lambda: pairs(6), validation_fraction=float(advice))
        (store,), _ = data.open_stores(repaired, split, cache_dir=tmp_path)
        assert len({store[number].query for number in range(len(store))}) == 1


def test_names_that_do_not_exist(contract: ScoringContract, tokenizer: Tokenizer) -> None:
    name = next(NAMES)
    data.add_labelled_task(name, pairs)
    with pytest.raises(InputError, match=f"Did you mean '{name}'"):
        data.open_stores(name.replace("registry", "registri"))
    with pytest.raises(InputError, match=r"no split 'trian'\. Did you mean 'train'"):
        data.open_stores(name, "trian")
    with pytest.raises(InputError, match=r"Did you mean 'inranker_jax\.tasks\.python_docs'"):
        data.import_task_modules(["inranker_jax.tasks.python_doc"])
    with pytest.raises(InputError, match=r"nowhere\.py: no such task module"):
        data.import_task_modules(["nowhere.py"])
    with pytest.raises(InputError, match="is not cached"):
        data.open_stores(name, use_cached=True)


@pytest.mark.parametrize(
    "arguments",
    [{"list_size": 0}, {"validation_fraction": 1.0}, {"relevance": "last"}, {"num_shards": 0}],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        data.add_labelled_task(next(NAMES), pairs, **arguments)
    with pytest.raises(InputError, match="one each"):
        data.LabelledPairs({"train": pairs}, validation_fraction=0.1)


class Reader:
    """A reader with state, which also refers to itself."""

    def __init__(self, count: int):
        self.count = count
        self.me = self

    def read(self) -> Iterator[LabelledPair]:
        return pairs(self.count)


def identity(source: Any, name: str) -> str | None:
    task = seqio.Task(name, source, data.OUTPUT_FEATURES, preprocessors=[seqio.CacheDatasetPlaceholder()])
    return registry.source_identity(task, "train")


def test_the_identity_follows_files_and_arguments(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text("one")
    first = identity(data.LabelledPairs(pairs, files=[path]), "t")
    assert first is not None
    assert identity(data.LabelledPairs(pairs, files=lambda: [path]), "t") == first
    others = [
        identity(data.LabelledPairs(pairs, files=[path]), "u"),
        identity(data.LabelledPairs(pairs, files=[path], list_size=2), "t"),
        identity(data.LabelledPairs(pairs, files=[path], validation_fraction=0.5), "t"),
        identity(data.LabelledPairs(lambda: pairs(7), files=[path]), "t"),
        identity(data.LabelledPairs(lambda: pairs(8), files=[path]), "t"),
        identity(data.LabelledPairs(pairs, files=[path], relevance="first"), "t"),
    ]
    for queries in (1, 2):
        others.append(identity(data.LabelledPairs(lambda count=queries: pairs(count), files=[path]), "t"))
    for count in (1, 2):
        others.append(identity(data.LabelledPairs(Reader(count).read, files=[path]), "t"))
        others.append(identity(data.LabelledPairs(functools.partial(pairs, count), files=[path]), "t"))
    path.write_text("two words")
    others.append(identity(data.LabelledPairs(pairs, files=[path]), "t"))
    os.utime(path, ns=(0, 10**18))
    others.append(identity(data.LabelledPairs(pairs, files=[tmp_path]), "t"))
    assert len({first, *others}) == len(others) + 1
    assert None not in others
    assert identity(data.LabelledPairs(pairs, files=[path]), "t") == identity(
        data.LabelledPairs(pairs, files=[tmp_path]), "t"
    ), "a folder stands for the files in it"
    # What cannot be told must not be reused.
    assert identity(data.LabelledPairs(pairs), "t") is None
    assert identity(data.LabelledPairs(pairs, files=[tmp_path / "none"]), "t") is None


def test_changed_files_are_read_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "count"
    name = next(NAMES)
    data.add_labelled_task(name, lambda: pairs(int(path.read_text())), files=[path])
    reads = []
    for count in ("3", "3", "14"):
        path.write_text(count)
        os.utime(path, ns=(0, int(count) * 10**9))
        (store,), _ = data.open_stores(name, cache_dir=tmp_path, memory_limit=100)
        reads.append((len(store), store.path))
    assert [size for size, _ in reads] == [15, 15, 70]
    assert reads[0][1] == reads[1][1] != reads[2][1]


def test_data_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INRANKER_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="INRANKER_DATA_DIR is not set: expected the folder that holds a/b"):
        data.data_path("a", "b")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="no such file or folder"):
        data.data_path("a")
    (tmp_path / "a").mkdir()
    assert data.data_path("a") == str(tmp_path / "a")


def test_importing_the_room_is_cheap() -> None:
    script = (
        "import sys, inranker_jax.data.batches, inranker_jax.data.shares, inranker_jax.corpora.inranker\n"
        "assert not {'tensorflow', 'seqio', 'gin'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        data.nonsense  # noqa: B018
