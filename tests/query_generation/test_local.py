"""A local model against a plain greedy loop, token by token."""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation.budget import Budget
from inranker_jax.query_generation.generators import Generation, Request, first_line
from inranker_jax.query_generation.local import LocalGenerator, LocalSettings
from inranker_jax.records import Document
from tests.query_generation import tiny_model

PROMPTS = [
    "What is the meaning",
    "Document: a text that is longer than the others, so that they are padded\nRelevant Query:",
    "Pergunta: qual é",
    "Example 2:\nDocument: more\nRelevant Query:",
    "of",
    "A document is relevant to a query when",
    "Não há",
    "relevance?",
    "Example",
    "informação suficiente to a text",
    "1 2 3",
    "What",
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.write_model(tmp_path_factory.mktemp(request.param), request.param)


def requests(prompts: list[str] = PROMPTS) -> list[Request]:
    return [Request(Document(f"d{i}", prompt), prompt) for i, prompt in enumerate(prompts)]


def collect(generator: LocalGenerator, asked: list[Request]) -> list[Generation]:
    return [answer for answers in generator.generate(asked, lambda: False) for answer in answers]


@functools.cache
def load(folder: pathlib.Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    return tiny_model.load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@functools.cache
def greedy(folder: pathlib.Path, prompt: str, steps: int) -> tuple[str, list[float], str]:
    """The definition: the most probable token again and again, until a line break or the end token."""
    import torch

    tokenizer, model = load(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kept: list[int] = []
    values: list[float] = []
    for _ in range(steps):
        with torch.no_grad():
            log_probs = model(ids).logits[0, -1].log_softmax(-1)
        token = int(log_probs.argmax())
        text = tokenizer.decode([token])
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(kept), values, "stop"
        if "\n" in text:
            if text.split("\n")[0].strip():
                kept.append(token)
                values.append(float(log_probs[token]))
            return tokenizer.decode(kept), values, "stop"
        kept.append(token)
        values.append(float(log_probs[token]))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokenizer.decode(kept), values, "length"


@pytest.mark.parametrize("batch_size", [2, 5])
def test_equals_a_greedy_loop(folder: pathlib.Path, batch_size: int) -> None:
    generator = LocalGenerator(
        LocalSettings(str(folder), batch_size=batch_size, max_new_tokens=12, device="cpu")
    )
    found = collect(generator, requests())
    assert [answer.document_id for answer in found] == [f"d{i}" for i in range(len(PROMPTS))]
    finishes = set()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        text, values, finish = greedy(folder, prompt, 12)
        assert answer.query == first_line(text)
        assert answer.log_probs == pytest.approx(values, abs=2e-4)
        assert answer.finish == finish
        finishes.add(finish)
        assert answer.prompt_tokens == len(load(folder)[0](prompt)["input_ids"])
    assert finishes == {"stop", "length"}, "both ends occur in this test"


def test_cut_counts_the_models_tokens(folder: pathlib.Path) -> None:
    generator = LocalGenerator(LocalSettings(str(folder), device="cpu"))
    tokenizer = tiny_model.load_tokenizer(folder)
    text = "A document is relevant. " * 30
    cut = generator.cut(text, 16)
    assert text.startswith(cut)
    assert len(tokenizer(cut)["input_ids"]) in (15, 16)  # a blank at the cut is dropped
    assert generator.cut("short", 16) == "short"


def test_a_prompt_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    folder = tiny_model.write_model(tmp_path, positions=40)
    generator = LocalGenerator(LocalSettings(str(folder), device="cpu", max_new_tokens=30))
    with pytest.raises(InputError, match=r"has 40 \(document 'd0'\)\. Lower --document_tokens"):
        collect(generator, requests(["relevance " * 20]))


def test_a_budget_stops_between_batches(folder: pathlib.Path) -> None:
    budget = Budget(requests=7)
    generator = LocalGenerator(
        LocalSettings(str(folder), device="cpu", batch_size=3, max_new_tokens=2), budget
    )
    found = []
    for answers in generator.generate(requests(), lambda: False):
        found.append(len(answers))
        for answer in answers:
            budget.spent.add(answer)
    assert found == [3, 3, 1]
    assert budget.exhausted == "7 requests"


def test_a_stop_is_heeded(folder: pathlib.Path) -> None:
    generator = LocalGenerator(LocalSettings(str(folder), device="cpu", batch_size=2, max_new_tokens=2))
    seen: list[int] = []
    for answers in generator.generate(requests(), lambda: len(seen) >= 2):
        seen.append(len(answers))
    assert seen == [2, 2]


def test_chat_needs_a_template(folder: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        LocalGenerator(LocalSettings(str(folder), chat=True, device="cpu"))


def test_chat_applies_the_template(tmp_path: pathlib.Path) -> None:
    folder = tiny_model.write_model(tmp_path)
    tokenizer = tiny_model.load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %} A:"
    tokenizer.save_pretrained(folder)
    generator = LocalGenerator(LocalSettings(str(folder), chat=True, device="cpu", max_new_tokens=8))
    (found,) = collect(generator, requests(["What is"]))
    text, values, _ = greedy(folder, "<user> What is A:", 8)
    assert found.query == first_line(text)
    assert found.log_probs == pytest.approx(values, abs=2e-4)


def test_no_such_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"no such folder"):
        LocalGenerator(LocalSettings(str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"cannot be loaded .* Expected a folder with a causal"):
        LocalGenerator(LocalSettings(str(tmp_path)))
    with pytest.raises(InputError, match=r"--dtype=float23: .* Did you mean 'float32'"):
        LocalGenerator(LocalSettings(str(tmp_path), dtype="float23"))


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def hub(name: str, **_: Any) -> None:
        raise AssertionError(f"{name} was asked of the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", hub)
    for name in ("./missing", "../missing", "~/missing"):
        with pytest.raises(InputError, match=rf"--generator=local:{re.escape(name)}: no such folder"):
            LocalGenerator(LocalSettings(name))


def test_weights_without_a_tokenizer_and_the_reverse(tmp_path: pathlib.Path) -> None:
    tiny_model.write_tokenizer(tmp_path)
    generator = LocalGenerator(LocalSettings(str(tmp_path), device="cpu"))
    with pytest.raises(InputError, match="cannot be loaded"):
        collect(generator, requests(["a"]))


def test_another_checkpoint_in_the_same_folder_is_noticed(tmp_path: pathlib.Path) -> None:
    identities = []
    for kind in ("gpt2", "llama"):
        tiny_model.write_model(tmp_path, kind)
        identities.append(LocalGenerator(LocalSettings(str(tmp_path))).identity)
    assert identities[0]["files"] != identities[1]["files"]


def test_other_weights_of_the_same_size_are_noticed(tmp_path: pathlib.Path) -> None:
    tiny_model.write_model(tmp_path)
    before = LocalGenerator(LocalSettings(str(tmp_path))).identity
    # Pickled weights are not read where there are safetensors.
    (tmp_path / "pytorch_model.bin").write_bytes(b"other")
    assert LocalGenerator(LocalSettings(str(tmp_path))).identity == before
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights += bytes(2**20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    large = LocalGenerator(LocalSettings(str(tmp_path))).identity
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert len({str(found["files"]) for found in (before, large)}) == 2
    assert LocalGenerator(LocalSettings(str(tmp_path))).identity["files"] != large["files"]


def test_a_hub_model_is_its_commit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's cache: a new commit is another identity, and the weights read are its own."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    found = []
    for commit, kind in (("a" * 40, "gpt2"), ("b" * 40, "llama")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        tiny_model.write_model(snapshot, kind)
        (repository / "refs" / "main").write_text(commit)
        found.append(LocalGenerator(LocalSettings("someone/tiny", device="cpu", max_new_tokens=4)))
    assert [generator.identity["files"] for generator in found] == ["a" * 40, "b" * 40]
    first = collect(found[0], requests())  # loaded now, when the hub's main branch has moved on
    assert first[0].query == first_line(greedy(repository / "snapshots" / ("a" * 40), PROMPTS[0], 4)[0])
    assert type(found[0]._model).__name__.startswith("GPT2")


def test_a_bad_device(tmp_path: pathlib.Path) -> None:
    tiny_model.write_model(tmp_path)
    generator = LocalGenerator(LocalSettings(str(tmp_path), device="gpu7"))
    with pytest.raises(InputError, match="--device=gpu7"):
        collect(generator, requests(["a"]))
