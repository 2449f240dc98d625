"""Passages and queries from the docstrings of the Python standard library (used by build_python_docs.py).

Every source file is parsed with `ast`; nothing is imported or executed. A passage is (part of) the body of a
docstring, and the docstring's summary line is held out of it as the human query. Further passages, without a
human query, are made of the one-line docstrings of a class or module and of the language reference that
`pydoc` carries (`pydoc_data/topics.py`).
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_WORDS = 64  # of a passage, so that query, title and passage fit in about 128 pieces
MIN_WORDS = 8
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
    "pydoc_data",
}
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+(?=[\"'`(*A-Z0-9_-])")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SUMMARY_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\beg\.)(?<!\betc\.)\s+")
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?[.:]?$")


@dataclass
class Passage:
    """One document of the collection.

    Attributes:
      id: `module:qualified.name`, with `#n` for the n-th part of a long docstring.
      source: the id without `#n`; passages of one source never serve as each other's negatives.
      title: the qualified name split in words.
      text: at most about `MAX_WORDS` words.
      kind: `docstring`, `members` (one-line docstrings of a class or module) or `reference` (pydoc's topics).
      summary: the summary line, for the first part of a docstring; "" otherwise.
      single: whether the source is this one passage.
      sentences: the sentences of the text, candidates for synthetic queries.
    """

    id: str
    source: str
    title: str
    text: str
    kind: str
    summary: str = ""
    single: bool = True
    sentences: list[str] = field(default_factory=list)


def words(text: str) -> list[str]:
    """Lower-case alphabetic words: `words("Don't, x2") == ["don't", "x"]`."""
    return _WORD.findall(text.lower())


def normal(text: str) -> str:
    """The form in which two queries count as the same one."""
    return " ".join(words(text))


def readable_name(name: str) -> str:
    """Splits a qualified name in lower-case words; a word that repeats the one before it is dropped.

    >>> readable_name("asyncio.queues.Queue.put_nowait")
    'asyncio queues queue put nowait'
    """
    parts = [part.lower() for piece in re.split(r"[._]+", name) for part in _CAMEL.split(piece) if part]
    return " ".join(part for n, part in enumerate(parts) if n == 0 or part != parts[n - 1])


def modules(stdlib: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields (module name, file), public modules first, so that of two copies the public one is kept."""
    found = []
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        rank = 2 if parts[0] in ("distutils", "idlelib", "lib2to3", "turtledemo") else int(parts[0][0] == "_")
        found.append((rank, name, path))
    for _, name, path in sorted(found):
        yield name, path


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, name of the enclosing scope, cleaned docstring) in source order."""
    seen: dict[str, int] = {}

    def visit(node: ast.AST, scope: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, scope)
                continue
            name = f"{scope}.{child.name}" if scope else child.name
            text = ast.get_docstring(child)
            if text:
                seen[name] = seen.get(name, 0) + 1
                yield name + (f"~{seen[name]}" if seen[name] > 1 else ""), scope, text
            yield from visit(child, name)

    text = ast.get_docstring(tree)
    if text:
        yield "", "", text
    yield from visit(tree, "")


def split_docstring(docstring: str) -> tuple[str, list[str]]:
    """Splits a cleaned docstring in its summary and the paragraphs of its body, without doctest examples.

    The summary is the first line when a blank line follows it, else the first sentence. A first line which is
    a call signature is dropped.
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines = block.splitlines()
        prompt = next((n for n, line in enumerate(lines) if line.lstrip().startswith(">>>")), None)
        kept = " ".join(" ".join(lines[:prompt]).split())
        if re.search(r"[A-Za-z]", kept):
            paragraphs.append(kept)
    if paragraphs and _SIGNATURE.match(docstring.strip().splitlines()[0].strip()):
        first = " ".join(docstring.strip().splitlines()[0].split())
        paragraphs[0] = paragraphs[0][len(first) :].strip()
        paragraphs = [p for p in paragraphs if p]
    if not paragraphs:
        return "", []
    summary, *rest = _SUMMARY_END.split(paragraphs[0], maxsplit=1)
    return summary, [*rest, *paragraphs[1:]]


def pack(units: list[str], limit: int = MAX_WORDS) -> list[list[str]]:
    """Packs sentences greedily into groups of at most `limit` white-space words; longer sentences are cut.

    A last group of under `MIN_WORDS` words joins the one before it.
    """
    pieces: list[str] = []
    for unit in units:
        tokens = unit.split()
        pieces += [" ".join(tokens[n : n + limit]) for n in range(0, len(tokens), limit)]
    groups: list[list[str]] = []
    room = 0
    for piece in pieces:
        length = len(piece.split())
        if not groups or length > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= length
    if len(groups) > 1 and sum(len(piece.split()) for piece in groups[-1]) < MIN_WORDS:
        last = groups.pop()
        groups[-1] += last
    return groups


def passages_of(source: str, title: str, summary: str, sentences: list[str], kind: str) -> list[Passage]:
    """Cuts one source into passages; none when it holds fewer than `MIN_WORDS` alphabetic words."""
    if len(words(" ".join(sentences))) < MIN_WORDS:
        return []
    groups = pack(sentences)
    return [
        Passage(
            id=source if n == 0 else f"{source}#{n + 1}",
            source=source,
            title=title,
            text=" ".join(group),
            kind=kind,
            summary=summary if n == 0 else "",
            single=len(groups) == 1,
            sentences=group,
        )
        for n, group in enumerate(groups)
        if len(words(" ".join(group))) >= MIN_WORDS
    ]


def sentences_of(paragraphs: list[str]) -> list[str]:
    """Sentences in order; list items and `name: meaning` lines count as sentences."""
    return [sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph) if sentence]


def stdlib_passages(stdlib: pathlib.Path) -> Iterator[Passage]:
    """Yields the `docstring` and `members` passages of every module under `stdlib`."""
    for module, path in modules(stdlib):
        members: dict[str, list[str]] = {}
        for name, scope, docstring in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            summary, paragraphs = split_docstring(docstring)
            source = f"{module}:{name}" if name else module
            title = readable_name(f"{module}.{re.sub('~.*', '', name)}")
            found = passages_of(source, title, summary, sentences_of(paragraphs), "docstring")
            yield from found
            if not found and name and len(words(summary)) >= 3:
                line = summary if summary.endswith((".", "!", "?")) else summary + "."
                member = re.sub("~.*", "", name.rsplit(".", 1)[-1])
                members.setdefault(scope, []).append(f"{readable_name(member)}: {line}")
        for scope, lines in members.items():
            title = readable_name(f"{module}.{scope}")
            yield from passages_of(f"{module}:{scope}:members", title, "", lines, "members")


def _is_prose(paragraph: str) -> bool:
    tokens = paragraph.split()
    plain = sum(1 for token in tokens if re.fullmatch(r"[(\"*'`]*[A-Za-z'-]+[)\"*'`.,;:!?]*", token))
    return len(tokens) >= 5 and plain >= 0.65 * len(tokens)


def reference_passages(stdlib: pathlib.Path) -> Iterator[Passage]:
    """Yields the `reference` passages: prose of the language reference, section by section."""
    tree = ast.parse((stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    topics: dict[str, str] = ast.literal_eval(
        next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics"
        )
    )
    for topic, text in sorted(topics.items()):
        section, number = "", 0
        pending: list[str] = []
        for block in [*re.split(r"\n\s*\n", text), "End\n***"]:
            heading = re.match(r"\s*(.+)\n\s*([*=~^-])\2{2,}\s*(\n|$)", block)
            if heading:
                source = f"reference:{topic}.{number}"
                title = f"python {readable_name(topic)} {' '.join(words(section))}"
                yield from passages_of(source, title, "", sentences_of(pending), "reference")
                section, pending, number = heading[1], [], number + 1
                block = block[heading.end() :]
            paragraph = " ".join(block.split())
            if _is_prose(paragraph):
                pending.append(paragraph)


def _shingles(text: str) -> set[str]:
    tokens = words(text)
    return {" ".join(tokens[n : n + 3]) for n in range(max(1, len(tokens) - 2))}


def deduplicate(passages: list[Passage], threshold: float) -> tuple[list[Passage], int]:
    """Drops every passage that shares most of its text with an earlier one.

    Args:
      passages: in order of preference.
      threshold: share of the smaller one's distinct word 3-grams found in the other, from which the later
        passage is a duplicate.

    Returns:
      The passages kept, and how many were dropped.
    """
    kept: list[Passage] = []
    sizes: list[int] = []
    holders: dict[str, list[int]] = {}
    for passage in passages:
        shingles = _shingles(passage.text)
        shared: dict[int, int] = {}
        for shingle in shingles:
            for holder in holders.get(shingle, ()):
                shared[holder] = shared.get(holder, 0) + 1
        if any(count >= threshold * min(len(shingles), sizes[holder]) for holder, count in shared.items()):
            continue
        for shingle in shingles:
            holders.setdefault(shingle, []).append(len(kept))
        kept.append(passage)
        sizes.append(len(shingles))
    return kept, len(passages) - len(kept)


def collect(stdlib: pathlib.Path, threshold: float = 0.5) -> tuple[list[Passage], int]:
    """All passages of the collection, deduplicated; and how many near-duplicates were dropped."""
    return deduplicate([*stdlib_passages(stdlib), *reference_passages(stdlib)], threshold)
