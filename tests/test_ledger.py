"""The ledger file: every tampering shows, every event survives, nothing is lost."""

import concurrent.futures
import fcntl
import json
import math

import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import ledger
from dpfa_jax.accounting.event import (
    BoundedRange,
    Composed,
    DiscreteGaussian,
    ExponentialMechanism,
    Gaussian,
    Laplace,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    Skellam,
    TruncatedPoissonSampled,
)

EVENTS = (
    Gaussian(0.1 + 0.2, 7),
    Laplace(1 / 3),
    DiscreteGaussian(5e-324),
    ExponentialMechanism(1.0, math.inf),
    RandomizedResponse(math.inf),
    BoundedRange(2.0),
    Skellam(5.0, 3.0, 2.0),
    PoissonSampled(Gaussian(1.0, 3), 0.01),
    TruncatedPoissonSampled(Gaussian(1.0), 0.01, 1000, 40),
    SampledWithoutReplacement(2.0, 1.0, 10, 1000),
    NonPrivate(),
    NoRelease(),
    Repeated(Composed((Laplace(2.0), Gaussian(1.0))), 10**20),
)


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "ledger.jsonl"
    ledger.append(where, Gaussian(4.0, 10), 3, label="layer 0")
    ledger.append(where, Laplace(9.0), label="größe")
    ledger.append(where, PoissonSampled(Gaussian(1.0), 0.01), 1000, label="training")
    return where


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_json_gives_the_event_back(event):
    text = json.dumps(ledger.to_json(event), allow_nan=False)
    assert ledger.from_json(json.loads(text)) == event


def test_verify_gives_the_history_back(path):
    found = ledger.verify(path)
    expected = (
        ledger.History()
        .spend(Gaussian(4.0, 10), 3, label="layer 0")
        .spend(Laplace(9.0), label="größe")
        .spend(PoissonSampled(Gaussian(1.0), 0.01), 1000, label="training")
    )
    assert found.history == expected
    assert found.history.epsilon(1e-5) == accounting.epsilon(expected.event, 1e-5)
    assert ledger.verify(path, head=found.head) == found


def test_verify_catches_changed_bytes(path):
    original = path.read_bytes()
    before = ledger.verify(path)
    for position in range(0, len(original), 3):
        changed = bytearray(original)
        changed[position] = changed[position] ^ 1
        path.write_bytes(bytes(changed))
        # A change of the white space between JSON values changes nothing that is said.
        try:
            after = ledger.verify(path)
        except ValueError:
            continue
        assert after == before


def test_verify_catches_removed_inserted_and_reordered_lines(path):
    lines = path.read_text().splitlines(keepends=True)
    for damaged in (
        lines[1:],
        lines[:1] + lines[2:],
        [lines[1], lines[0], lines[2]],
        [*lines, lines[-1]],
        [lines[0], lines[0], *lines[1:]],
        [*lines, "\n"],
        [*lines, "{}\n"],
        [*lines, "[" * 100_000 + "\n"],
        [*lines[:2], lines[2].rstrip("\n")],
    ):
        path.write_text("".join(damaged))
        with pytest.raises(ValueError, match=r"ledger\.jsonl"):
            ledger.verify(path)
        with pytest.raises(ValueError, match=r"ledger\.jsonl"):
            ledger.append(path, Laplace(1.0))
        assert path.read_text() == "".join(damaged)


def test_verify_catches_a_cut_end_given_the_head(path):
    head = ledger.verify(path).head
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    assert len(ledger.verify(path).history.entries) == 2  # by itself it is a valid chain
    with pytest.raises(ValueError, match="cut off"):
        ledger.verify(path, head=head)


def test_verify_catches_a_rehashed_line(path):
    """Someone lowers a count and recomputes that line's hash: the next line betrays it."""
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[0])
    record["count"] = 1
    del record["hash"]
    record["hash"] = ledger._hash(ledger.GENESIS, record)
    path.write_text(json.dumps(record) + "\n" + "".join(lines[1:]))
    with pytest.raises(ValueError, match="line 2"):
        ledger.verify(path)


def test_verify_refuses_a_name_that_occurs_twice(path):
    text = path.read_text()
    path.write_text(text.replace('"count": 3', '"count": 1, "count": 3', 1))
    with pytest.raises(ValueError, match="twice"):
        ledger.verify(path)


@pytest.mark.parametrize(
    "written",
    [
        None,
        [],
        {},
        {"kind": "Event"},
        {"kind": "Gaussian"},
        {"kind": "Gaussian", "noise_multiplier": 1.0},
        {"kind": "Gaussian", "noise_multiplier": math.nan, "coordinates": 0},
        {"kind": "Gaussian", "noise_multiplier": "1", "coordinates": 0},
        {"kind": "Gaussian", "noise_multiplier": 1.0, "coordinates": 0, "delta": 0},
        {"kind": "Composed", "events": []},
        {"kind": "Composed", "events": "abc"},
        {"kind": "Repeated", "event": {"kind": "NoRelease"}, "count": 0},
        {"kind": "Repeated", "event": 3, "count": 1},
        {"kind": ["Gaussian"]},
    ],
)
def test_from_json_refuses_what_is_no_event(written):
    with pytest.raises((ValueError, TypeError)):
        ledger.from_json(written)


def test_append_waits_for_whoever_holds_the_lock(path):
    with open(path, "a") as holder, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fcntl.flock(holder, fcntl.LOCK_EX)
        waiting = pool.submit(ledger.append, path, Laplace(1.0))
        with pytest.raises(concurrent.futures.TimeoutError):
            waiting.result(timeout=0.5)
        assert len(ledger.verify(path).history.entries) == 3
        fcntl.flock(holder, fcntl.LOCK_UN)
        assert len(waiting.result(timeout=60).history.entries) == 4


def _append_some(path, index):
    for _ in range(5):
        ledger.append(path, Laplace(float(index + 1)), label=f"process {index}")


def test_append_from_many_threads_loses_nothing(tmp_path):
    path = tmp_path / "shared.jsonl"
    # Each append opens the file anew, so its lock excludes other threads as it does processes.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(_append_some, [path] * 3, range(3)))
    entries = ledger.verify(path).history.entries
    assert len(entries) == 15
    for index in range(3):
        assert sum(entry.label == f"process {index}" for entry in entries) == 5


def test_verify_of_an_empty_file_is_an_empty_history(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert ledger.verify(path) == ledger.Verification(ledger.History(), ledger.GENESIS)
    with pytest.raises(FileNotFoundError):
        ledger.verify(tmp_path / "missing.jsonl")


def test_history_is_a_value_and_adds_up():
    empty = ledger.History()
    one = empty.spend(Gaussian(4.0), 8, label="layer 0")
    two = one.spend(Composed((Gaussian(4.0), Laplace(9.0))), 2, label="layer 1")
    assert empty.entries == () and len(one.entries) == 1
    assert empty.event == NoRelease()
    whole = Composed((Repeated(Gaussian(4.0), 10), Repeated(Laplace(9.0), 2)))
    assert two.event == whole
    # The sum that was carried along is the sum of the entries.
    assert ledger.History(two.entries).event == whole
    assert ledger.History(two.entries) == two and hash(ledger.History(two.entries)) == hash(two)
    assert one.event == Composed((Repeated(Gaussian(4.0), 8),))
    parts = two.by_label(1e-5)
    assert list(parts) == ["layer 0", "layer 1"]
    assert max(parts.values()) < two.epsilon(1e-5)


@pytest.mark.parametrize("bad", [0, -1, 1.0, math.nan, None, "2", True])
def test_spend_refuses_what_is_no_count(bad, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        ledger.History().spend(Gaussian(1.0), bad)
    with pytest.raises((TypeError, ValueError)):
        ledger.append(tmp_path / "file.jsonl", Gaussian(1.0), bad)
    assert not (tmp_path / "file.jsonl").exists()
