"""Text that every machine has, as private records and held-out bytes, and two baselines of it.

The corpus is the sources of the running Python's standard library (without its tests, which not
every distribution ships) and the topics of `pydoc`. Which files are held out is decided by the hash
of their names, so that no file is on both sides.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig

import numpy as np

WIDTH = 256
"""Bytes of a window: what the model reads at a time."""

PAD = -1
"""Fills windows that reach beyond the end of a short file; costs nothing and trains nothing."""

START = 256
"""Stands before the first byte of a window."""


def files() -> dict[str, bytes]:
    """Name and content of every document, in order of the names."""
    import pydoc_data.topics

    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    apart = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*.py")
        if not apart & set(path.relative_to(root).parts)
        and path.name != "topics.py"  # its topics are documents of their own
    }
    found |= {f"pydoc/{name}": text.encode() for name, text in pydoc_data.topics.topics.items()}
    return dict(sorted(found.items()))


def is_held_out(name: str) -> bool:
    """Whether a document is one of the tenth that nothing trains on."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Private records and public bytes.

    Attributes:
      records: int16 (n, windows, WIDTH), one privacy unit a row.
      held_out: int16 (m, WIDTH), chunks of files that are no record.
      digest: of the whole corpus, since Python versions differ in their sources.
    """

    records: np.ndarray
    held_out: np.ndarray
    digest: str


def chunks(content: bytes) -> np.ndarray:
    """The whole windows of a document, one after another; a rest that is shorter is left out."""
    whole = len(content) // WIDTH
    return np.frombuffer(content[: whole * WIDTH], np.uint8).reshape(whole, WIDTH).astype(np.int16)


def windows(content: bytes, count: int) -> np.ndarray:
    """`count` windows at even distances over a document, padded where it is short."""
    starts = np.linspace(0, max(len(content) - WIDTH, 0), count).astype(int)
    cut = np.full((count, WIDTH), PAD, np.int16)
    for row, start in zip(cut, starts, strict=True):
        part = np.frombuffer(content[start : start + WIDTH], np.uint8)
        row[: len(part)] = part
    return cut


def load(unit: str, windows_per_file: int, most_records: int | None = None) -> Corpus:
    """The corpus with one record per unit.

    Args:
      unit: "chunk" (256 bytes) or "file" (a whole document, of which some windows are read).
      windows_per_file: of a record where the unit is a file.
      most_records: keep only the first ones, for small runs.
    """
    documents = files()
    sha = hashlib.sha256()
    for name, content in documents.items():
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
    private = [content for name, content in documents.items() if not is_held_out(name)]
    public = [content for name, content in documents.items() if is_held_out(name)]
    if unit == "chunk":
        records = np.concatenate([chunks(content) for content in private])[:, None, :]
    else:
        records = np.stack([windows(content, windows_per_file) for content in private])
    return Corpus(
        records[:most_records], np.concatenate([chunks(c) for c in public]), sha.hexdigest()[:12]
    )


# Baselines, without privacy ---------------------------------------------------------------------


def unigram_bits(records: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per held-out byte of the frequencies of single bytes (plus one)."""
    flat = records[records >= 0]
    counts = np.bincount(flat, minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[held_out.ravel()].mean())


def _codes(rows: np.ndarray, length: int) -> np.ndarray:
    """The `length` symbols before each byte as one integer, START before the first."""
    padded = np.concatenate(
        [np.full((len(rows), length), START, np.int64), rows.astype(np.int64)], 1
    )
    code = np.zeros(rows.shape, np.int64)
    for back in range(length, 0, -1):
        code = code * 257 + padded[:, length - back : length - back + rows.shape[1]]
    return code


def ngram_bits(records: np.ndarray, held_out: np.ndarray, order: int) -> float:
    """Bits per held-out byte of an interpolated n-gram model (Witten and Bell 1991).

    p(c | h) = (N(hc) + T(h)·p(c | h'))/(N(h) + T(h)), T(h) the number of different bytes seen after
    the context h, h' the context one symbol shorter, 1/256 at the end. Contexts stay in a window.

    Args:
      records: training windows.
      held_out: windows to predict.
      order: bytes predicted from order − 1 others, in [1, 7].
    """
    rows = records.reshape(-1, records.shape[-1])
    seen = rows >= 0
    shown = np.where(seen, rows, 0)
    probability = np.full(held_out.shape, 1 / 256.0)
    for length in range(order):
        context, wanted = _codes(shown, length)[seen], _codes(held_out, length)
        grams = context * 257 + shown[seen]
        kinds, counts = np.unique(grams, return_counts=True)
        owners, first, distinct = np.unique(kinds // 257, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)

        def look_up(table, values, keys):
            place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
            return np.where(table[place] == keys, values[place], 0)

        total, kind = (look_up(owners, each, wanted) for each in (totals, distinct))
        count = look_up(kinds, counts, wanted * 257 + held_out)
        seen_before = total > 0
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(seen_before, mixed, probability)
    return float(-np.log2(probability).mean())
