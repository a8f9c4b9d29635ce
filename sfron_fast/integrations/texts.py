"""Texts in jsonl files as batches of ``sf.Language()``.

    forget, retain = Texts("forget.jsonl", tokenizer), Texts("retain.jsonl", tokenizer)
    check_apart(forget=forget, retain=retain)
    sf.unlearn(model, forget=forget.loader(), retain=retain.loader(), task=sf.Language(), ...)

A line is one of

    {"prompt": ..., "completion": ...}  as they stand, one behind the other
    {"question": ..., "answer": ...}    prompt "Question: ...\\nAnswer: ", as TOFU has it
    {"text": ...}                       all of it is what is known
    {"messages": [{"role": ..., "content": ...}, ...]}  through the tokenizer's chat template

What is to be forgotten or kept is the completion, the answer, the text, what the assistant says;
the rest gets the label -100.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import integer, require, warn

FORMS = ({"prompt", "completion"}, {"question", "answer"}, {"text"}, {"messages"})
SHOWN = ", ".join("{" + ", ".join(sorted(form, reverse=True)) + "}" for form in FORMS)
IGNORED = -100
SHARED = 32  # words in a row that make two texts overlap
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Texts:
    """The texts of a jsonl file, tokenised; a data set of {"input_ids", "labels", "id"}.

    ``id`` is the place in the file, from 0, among lines that are not empty. The end-of-sequence
    token is put behind each text, and labelled, except behind messages, whose template ends them.

    Args:
        path: the file, a JSON object a line.
        tokenizer: of transformers, a fast one; for messages with a chat template that marks what
            the assistant says with {% generation %}.
        max_length: tokens; longer texts are cut at the end.
        name: what errors call it, None = the file's name.

    Raises:
        ValueError: no such file, no text in it, or a line that cannot be read, by its number; a
            text with fewer than two labelled tokens behind its first.

    Warns:
        RuntimeWarning: texts were cut.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        max_length: int = 1024,
        name: str | None = None,
    ) -> None:
        self.path, self.tokenizer = Path(path), tokenizer
        self.name = name or self.path.name
        limit = integer("max_length", max_length, 3)
        fast = getattr(tokenizer, "is_fast", False) and tokenizer.eos_token_id is not None
        found = type(tokenizer).__name__
        require(fast, "tokenizer", "a fast one with an end-of-sequence token", found)
        require(self.path.is_file(), self.name, "a jsonl file", self.path)
        self.rows: list[tuple[list[int], list[int]]] = []  # tokens, labels
        self.lines: list[int] = []
        self.contents: list[tuple[str, str]] = []  # of each the whole text, and what is labelled
        cut = 0
        for line, row in self._objects():
            place = f"{self.name}, line {line}"
            ids, labels, content = _tokens(row, tokenizer, place)
            cut += len(ids) > limit
            ids, labels = ids[:limit], labels[:limit]
            labelled = sum(label != IGNORED for label in labels[1:])
            remedy = "raise max_length, or leave the line out"
            expected = f"two labelled tokens or more within {limit} tokens"
            require(labelled > 1, place, expected, labelled, remedy)
            self.rows.append((ids, labels))
            self.lines.append(line)
            self.contents.append(content)
        require(bool(self.rows), self.name, "at least one text", f"none in {self.path}")
        if cut:
            warn(f"{self.name}: {cut} of {len(self)} texts were cut at {limit} tokens")

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of each line that is not empty."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: expected UTF-8, found {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{self.name}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: expected a JSON object, found {error}") from error
                known = isinstance(row, dict) and any(form <= row.keys() for form in FORMS)
                found = sorted(row) if isinstance(row, dict) else type(row).__name__
                require(known, place, f"an object with one of {SHOWN}", found)
                yield number, row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = self.rows[index]
        return {"input_ids": ids, "labels": labels, "id": index}

    def loader(
        self, batch_size: int = 16, *, seed: int | None = 0, rank: int = 0, ranks: int = 1
    ) -> DataLoader[Any]:
        """Batches, padded on the right; shuffled by ``seed``, None = in the order of the file.

        Of several ``ranks``, which share every batch of ``batch_size``, the part of one; where
        texts do not divide, some come twice, as torch's DistributedSampler has it.
        """
        shuffle = seed is not None
        sampler: DistributedSampler[Any] | None = None
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        if ranks > 1:
            data: Any = self
            sampler = DistributedSampler(data, ranks, rank, shuffle=shuffle, seed=seed or 0)
        return DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=-(-integer("batch_size", batch_size, 1) // ranks),
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            generator=generator,
            collate_fn=self.collate,
        )

    def some(self, count: int) -> "list[dict[str, Any]]":
        """At most ``count`` texts, evenly spaced."""
        places = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long().unique()
        return [self[int(place)] for place in places]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask, labels [samples, longest] and id [samples], int64."""
        known = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if known is None else known
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {
            "input_ids": padded("input_ids", pad),
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "labels": padded("labels", IGNORED),
            "id": torch.tensor([row["id"] for row in rows]),
        }


def check_apart(**sets: Texts | None) -> None:
    """Refuse sets, named by keyword, that share a text.

    Two texts are the same if their words are, whatever case and spaces; and of what is labelled,
    32 words in a row may not be in both.

    Raises:
        ValueError: with both files and lines.
    """
    seen: dict[tuple[bool, int], tuple[str, int]] = {}
    for name, texts in sets.items():
        found: dict[tuple[bool, int], tuple[str, int]] = {}
        if texts is None:
            continue
        for line, content in zip(texts.lines, texts.contents, strict=True):
            for key in _keys(*content):
                found.setdefault(key, (name, line))
                if key in seen:
                    other, there = seen[key]
                    what = f"{SHARED} words in a row" if key[0] else "the whole text"
                    require(
                        False,
                        f"{name}, line {line}",
                        f"a text that is not in {other} too",
                        f"{what} in {other}, line {there}",
                        "take it out of one of them",
                    )
        seen = {**found, **seen}


def _keys(whole: str, labelled: str) -> set[tuple[bool, int]]:
    """What two texts that overlap have in common: the whole, or a run of labelled words."""
    words = labelled.casefold().split()
    runs = {(True, hash(tuple(words[i : i + SHARED]))) for i in range(len(words) - SHARED + 1)}
    return runs | {(False, hash(tuple(whole.casefold().split())))}


def _tokens(
    row: dict[str, Any], tokenizer: Any, place: str
) -> tuple[list[int], list[int], tuple[str, str]]:
    """Tokens, labels, and the texts (whole, labelled) of a line."""
    if "messages" in row:
        return _of_messages(row["messages"], tokenizer, place)
    if "text" in row:
        prompt, answer = "", row["text"]
    elif "prompt" in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        prompt, answer = row["question"], row["answer"]
    for key, value in zip(
        ("prompt or question", "completion, answer or text"), (prompt, answer), strict=True
    ):
        right = isinstance(value, str) and (bool(value.strip()) or value is prompt)
        require(right, place, f"words as {key}", repr(value))
    if "question" in row:
        prompt = f"Question: {prompt}\nAnswer: "
    coded = tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = list(coded["input_ids"])
    # a token that holds both the prompt's end and the answer's begin is the answer's
    labels = [
        token if end > max(len(prompt), start) else IGNORED
        for token, (start, end) in zip(ids, coded["offset_mapping"], strict=True)
    ]
    end = tokenizer.eos_token_id
    if ids[-1:] != [end]:
        ids.append(end)
        labels.append(end)
    labels[-1] = end
    return ids, labels, (prompt + " " + answer, answer)


def _of_messages(
    messages: Any, tokenizer: Any, place: str
) -> tuple[list[int], list[int], tuple[str, str]]:
    """The same of a conversation."""
    right = isinstance(messages, list) and bool(messages)
    right = right and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    require(right, place, "messages [{role, content}, ...]", repr(messages)[:80])
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    marked = bool(GENERATION.search(template))
    remedy = "put {% generation %} ... {% endgeneration %} around what the assistant says in"
    require(
        marked,
        place,
        "a tokenizer whose chat template has {% generation %}",
        "one without" if template else "no chat template",
        f"{remedy} tokenizer.chat_template, or write prompt and completion",
    )
    coded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, said = list(coded["input_ids"]), coded["assistant_masks"]
    labels = [token if one else IGNORED for token, one in zip(ids, said, strict=True)]
    contents = [str(m["content"]) for m in messages]
    assistant = [str(m["content"]) for m in messages if m["role"] == "assistant"]
    return ids, labels, (" ".join(contents), " ".join(assistant))
