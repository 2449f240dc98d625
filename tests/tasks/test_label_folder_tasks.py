"""Tasks over label folders by the thesis's names, and English labels for a Portuguese student."""

from __future__ import annotations

import importlib
import itertools
import pathlib
import re

import numpy as np
import pytest

from inranker_jax import data
from inranker_jax.corpora import inranker
from inranker_jax.errors import InputError
from inranker_jax.prompts import Tokenizer, preset
from tests.data import label_folders as toy

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")
pytest.importorskip("pyarrow", reason="needs the [label] extra")

# Thesis, Table 2, row by row: in sample set 1, in sample set 2.
TABLE_2 = {
    "trec-covid": (False, True),
    "nfcorpus": (True, False),
    "bioasq": (False, True),
    "nq": (True, True),
    "hotpotqa": (True, True),
    "climate-fever": (False, False),
    "dbpedia-entity": (True, False),
    "trec-news": (False, False),
    "robust04": (False, True),
    "arguana": (False, False),
    "webis-touche2020": (False, False),
    "quora": (True, False),
    "scidocs": (True, True),
    "scifact": (False, True),
    "fiqa": (True, True),
    "signal1m": (True, False),
}
KINDS = ("beir_synthetic", "beir_real")


def members(mixture: str) -> set[str]:
    return {task.name for task in seqio.MixtureRegistry.get(mixture).tasks}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_sample_sets(kind: str) -> None:
    importlib.import_module(f"inranker_jax.tasks.{kind}")
    for suffix in ("", "_lists"):
        names = {dataset: f"{kind}_{dataset.replace('-', '_')}{suffix}" for dataset in TABLE_2}
        assert members(f"{kind}_all{suffix}") == set(names.values())
        for number in (1, 2):
            expected = {names[dataset] for dataset, sets in TABLE_2.items() if sets[number - 1]}
            assert len(expected) == 8
            assert members(f"{kind}_sample_set_{number}{suffix}") == expected
        for name in names.values():
            assert seqio.TaskRegistry.get(name).splits == ("train", "validation")


def test_a_sample_set_trains_by_size_and_shares_no_query(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every folder holds some of the same queries; a query is on one side in all of them."""
    module = importlib.import_module("inranker_jax.tasks.beir_synthetic")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    # "query number 4461" and "... 4784" are the first that fall into the thousandth for validation.
    sizes = {dataset: 20 + 10 * number for number, dataset in enumerate(module.SAMPLE_SET_1)}
    sizes |= {"nq": 4500, "fiqa": 4800}
    for dataset, queries in sizes.items():
        toy.write_label_folder(tmp_path / "beir_synthetic" / dataset, queries, documents=5, per_query=2)
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        stores, rates = data.open_stores("beir_synthetic_sample_set_1_lists", split, cache_dir=tmp_path / "c")
        assert rates == [len(store) for store in stores]
        expected = sorted(module.SAMPLE_SET_1 if split == "train" else ("nq", "fiqa"))
        assert [store.name.split("_")[2] for store in stores] == [name.split("-")[0] for name in expected]
        sides[split] = {store[number].query for store in stores for number in range(len(store))}
    assert sides["validation"] == {toy.texts("query", number) for number in (4461, 4784)}
    assert not sides["train"] & sides["validation"]
    assert sides["train"] | sides["validation"] == {toy.texts("query", n) for n in range(max(sizes.values()))}
    stores, rates = data.open_stores(
        "beir_synthetic_sample_set_1", cache_dir=tmp_path / "c", rates=data.temperature(2.0)
    )
    assert rates == [len(store) ** 0.5 for store in stores]
    assert stores[0].max_list_size == 1


@pytest.mark.parametrize(
    ("name", "path", "command"),
    [
        (
            "beir_synthetic_webis_touche2020",
            "beir_synthetic/webis-touche2020",
            "inranker_jax.label --queries",
        ),
        ("beir_real_nq_lists", "beir_real/nq", "inranker_jax.label --queries=BEIR_FOLDER --qrels"),
        ("quati_synthetic", "quati_synthetic", "inranker_jax.label --queries=SYNTHETIC_QUERIES"),
        ("quati_real_lists", "quati_real", "--qrels=QRELS"),
        ("msmarco_human_soft", "InRanker_msmarco.tsv", "unicamp-dl/InRanker-msmarco"),
        ("mmarco_pt_human_soft", "InRanker_msmarco.tsv", "unicamp-dl/InRanker-msmarco"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    name: str, path: str, command: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = ("beir_synthetic", "beir_real", "quati", "msmarco", "mmarco")
    data.import_task_modules([f"inranker_jax.tasks.{module}" for module in modules])
    monkeypatch.delenv("INRANKER_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="INRANKER_DATA_DIR is not set"):
        data.open_stores(name)
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    place = re.escape(str(tmp_path / path))
    with pytest.raises(InputError, match=f"^{place}: no such file or folder.*{re.escape(command)}"):
        data.open_stores(name)


def test_all_missing_sets_of_a_mixture_are_named_before_any_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("inranker_jax.tasks.beir_synthetic")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    there = ("trec-covid", "nq", "fiqa")
    for dataset in there:
        toy.write_label_folder(tmp_path / "beir_synthetic" / dataset, 3, documents=5, per_query=2)
    (tmp_path / "beir_synthetic" / "scifact").mkdir()
    with pytest.raises(InputError, match="5 of its 8 tasks have no data") as raised:
        data.open_stores("beir_synthetic_sample_set_2_lists", cache_dir=tmp_path / "c")
    message = str(raised.value)
    for dataset in module.SAMPLE_SET_2:
        assert (str(tmp_path / "beir_synthetic" / dataset) in message) == (dataset not in there)
    assert "inranker_jax.label --queries" in message
    assert not (tmp_path / "c").exists()


def test_a_label_folder_from_the_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("inranker_jax.tasks.label_folders")
    monkeypatch.setenv("LABEL_FOLDER", str(toy.write_label_folder(tmp_path / "labels")))
    (store,), _ = data.open_stores("label_folder_lists", cache_dir=tmp_path)
    assert (len(store), store.max_list_size) == (30, 4)


def test_mmarco_joins_english_labels_with_portuguese_texts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmarco = importlib.import_module("inranker_jax.tasks.mmarco")
    folder = tmp_path / "mmarco" / "google"
    for place, name, text in (
        ("collections", "portuguese_collection.tsv", "0\tum pássaro\n1\tuma biblioteca\n"),
        ("queries/train", "portuguese_queries.train.tsv", "100\to que é jax\n"),
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / name).write_text(text)
    (tmp_path / "InRanker_msmarco.tsv").write_text("1.5\t-2\t100\t1\n-3\t2.5\t100\t0\n")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    (store,), _ = data.open_stores("mmarco_pt_human_soft_lists", cache_dir=tmp_path / "c")
    (example,) = (store[number] for number in range(len(store)))
    assert (example.query, example.documents) == ("o que é jax", ("uma biblioteca", "um pássaro"))
    assert example.teacher_logits is not None
    assert example.teacher_logits.tolist() == [[-2.0, 1.5], [2.5, -3.0]]
    with pytest.raises(InputError, match="no language 'xx'"):
        mmarco.register("xx")


@pytest.mark.parametrize(
    ("contract", "opening", "labels"),
    [("monoptt5", "Pergunta: ", ("▁Não", "▁Sim")), ("ptt5_msmarco", "Query: ", ("▁não", "▁sim"))],
)
def test_english_labels_train_a_portuguese_student(
    contract: str, opening: str, labels: tuple[str, str], shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """pira-en was labelled; pira-pt is trained on, in PTT5's vocabulary, with the student's prompt and pieces."""
    english, portuguese = (shared_data / "beir" / f"pira-{language}" for language in ("en", "pt"))
    scored = list(inranker.read_msmarco_tsv(shared_data / "teacher" / "pira_en_human.tsv", english, english))
    folder = toy.write_pairs(tmp_path / "labels", scored, english)
    register = importlib.import_module("inranker_jax.tasks.label_folders").register
    name = f"test_pira_{contract}"
    register(name, folder, list_size=10, queries=portuguese, documents=portuguese, validation_fraction=0.2)
    (tmp_path / "ptt5").mkdir()
    (tmp_path / "ptt5" / "spiece.model").symlink_to(shared_data / "vocab" / "ptt5_spiece.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "ptt5")
    student = preset(contract).replace(max_length=192)
    pieces = tuple(tokenizer.piece_to_id(piece) for piece in labels)
    assert student.label_ids(tokenizer) == pieces
    by_id = {(pair.query_id, pair.document_id): pair for pair in scored}
    from inranker_jax import corpora

    texts = corpora.open_corpus(portuguese).texts()
    questions = {query.id: query.text for query in corpora.open_queries_any(portuguese).queries()}
    with data.open_stream(
        name, contract=student, tokenizer=tokenizer, batch_size=4, cache_dir=tmp_path
    ) as stream:
        for batch in itertools.islice(stream, 3):
            for row, (query_id, document_ids) in enumerate(batch.examples):
                for place, document_id in enumerate(document_ids):
                    pair = by_id[query_id, document_id]
                    np.testing.assert_array_equal(
                        batch["teacher_logits"][row, place], np.float32(pair.logits)
                    )
                    (ids,) = student.encode(tokenizer, [questions[query_id]], [texts[document_id]])
                    assert batch["tokens"][row, place][: len(ids)].tolist() == list(ids)
                    assert questions[query_id] != pair.query
                assert batch["relevance"][row].tolist() == [1] + [0] * 9
    assert student.template.startswith(opening)
