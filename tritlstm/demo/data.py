"""The text of the demo: Python source files, cut into training and held-out text, as ids of bytes.

Everything here is a pure function of the files: no random numbers, no dependence on the order in which the
file system lists them.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNKNOWN_ID = 0
UNKNOWN_BYTE = 0x1A  # ASCII "substitute"
MIN_COUNT = 10  # rarer bytes become UNKNOWN_ID, so that its embedding is trained as well
HELD_OUT_ONE_IN = 20

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    # Tables written by programs: nearly the same text in many files, so held-out files would not be unseen.
    | {"encodings", "pydoc_data"}
)


class TextError(ValueError):
    """The folder given for the text cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as ids.

    Attributes:
        vocabulary: uint8 [V], the byte of every id; id 0 stands for every byte that is not listed.
        train: uint8 [N], the training files one after another.
        held_out: uint8 [M], the held-out files one after another.
        train_files, held_out_files: paths relative to the folder, with "/" between parts, in the order used.
        fingerprint: sha256 (hexadecimal) over names and contents of all files and the split.
    """

    vocabulary: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    fingerprint: str


def standard_library() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stable_hash(name: str) -> int:
    """A 64-bit number that depends on nothing but the characters of `name`."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether the file with this relative path ("/" between parts) is kept for validation."""
    return stable_hash(name) % HELD_OUT_ONE_IN == 0


def list_files(root: Path) -> list[str]:
    """Relative paths of the `.py` files under `root`, by their hash, so that neighbours are unrelated."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        names.extend(
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")
        )
    return sorted(names, key=lambda name: (stable_hash(name), name))


def encode(text: bytes | np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Ids (uint8 [n]) of bytes; bytes that `vocabulary` (uint8 [V]) does not list become `UNKNOWN_ID`."""
    table = np.full(256, UNKNOWN_ID, np.uint8)
    table[vocabulary] = np.arange(len(vocabulary), dtype=np.uint8)
    return table[np.frombuffer(text, np.uint8)] if isinstance(text, bytes) else table[text]


def decode(ids: np.ndarray, vocabulary: np.ndarray) -> str:
    """The text of ids (any integer type, [n]); broken UTF-8 is shown with the replacement character."""
    return vocabulary[np.asarray(ids)].tobytes().decode("utf-8", "replace")


def find_vocabulary(text: np.ndarray) -> np.ndarray:
    """uint8 [V]: the unknown byte, then in rising order every byte that `text` (uint8) holds often enough."""
    counts = np.bincount(text, minlength=256)
    counts[UNKNOWN_BYTE] = 0
    return np.concatenate([[UNKNOWN_BYTE], np.flatnonzero(counts >= MIN_COUNT)]).astype(np.uint8)


def load(root: Path) -> Corpus:
    """Read and split all Python files under `root`.

    Raises:
        TextError: no folder, or too little text in it to train on or to hold out.
    """
    if not root.is_dir():
        raise TextError(f"no folder {root}: give one that holds Python files with --text DIR")
    digest = hashlib.sha256()
    names: dict[bool, list[str]] = {False: [], True: []}
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in list_files(root):
        content = (root / name).read_bytes().replace(b"\r\n", b"\n")
        if not content.strip():
            continue
        held_out = is_held_out(name)
        digest.update(f"{name}\0{len(content)}\0{held_out}\0".encode("utf-8", "surrogateescape") + content)
        names[held_out].append(name)
        parts[held_out].append(content if content.endswith(b"\n") else content + b"\n")
    train, held_out_text = (np.frombuffer(b"".join(parts[side]), np.uint8) for side in (False, True))
    for what, text in (("training", train), ("held-out", held_out_text)):
        if len(text) < 1024:
            raise TextError(
                f"{root} gives {len(text)} bytes of {what} text in {len(names[what != 'training'])} Python "
                "files, at least 1024 are needed: give a folder with more Python files with --text DIR"
            )
    vocabulary = find_vocabulary(train)
    return Corpus(
        vocabulary,
        encode(train, vocabulary),
        encode(held_out_text, vocabulary),
        tuple(names[False]),
        tuple(names[True]),
        digest.hexdigest(),
    )


def streams(ids: np.ndarray, count: int) -> np.ndarray:
    """Cut ids [n] into `count` streams of equal length: [n // count, count]; the rest is dropped."""
    length = len(ids) // count
    return np.ascontiguousarray(ids[: length * count].reshape(count, length).T)


class Bigrams:
    """Counts of bytes and of pairs of bytes, smoothed: baselines for a model that reads byte by byte.

    The unigram model gives id v the probability (n(v) + 1) / (n + V). The bigram model adds that distribution
    to the counts behind every id, with the weight of one observation: (n(u, v) + p(v)) / (n(u) + 1).
    """

    def __init__(self, ids: np.ndarray, size: int) -> None:
        """ids: integers [n] below `size` = V."""
        counts = np.bincount(ids, minlength=size).astype(np.float64)
        self.unigram = (counts + 1.0) / (counts.sum() + size)  # [V]
        pairs = np.bincount(ids[:-1].astype(np.int64) * size + ids[1:], minlength=size * size)
        pairs = pairs.reshape(size, size).astype(np.float64)
        self.bigram = (pairs + self.unigram) / (pairs.sum(1, keepdims=True) + 1.0)  # [V, V]

    def perplexity(self, previous: np.ndarray, following: np.ndarray) -> tuple[float, float]:
        """Perplexity of (unigram, bigram) on `following`, given `previous` of the same shape."""
        unigram = np.exp(-np.log(self.unigram[following]).mean())
        bigram = np.exp(-np.log(self.bigram[previous, following]).mean())
        return float(unigram), float(bigram)
