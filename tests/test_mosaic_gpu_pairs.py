"""Which statement does this file keep true? The third sums of long memories are double words.

What the kernels emit for one thread is executed here, one operation at a time in float32, with the
texts of its loads and stores; tests marked `gpu` in test_mosaic_gpu.py run the whole kernel.
"""

import re
import types
from fractions import Fraction

import numpy as np
import pytest

from dpfa_jax.pallas import mosaic_gpu_kept
from dpfa_jax.pallas import mosaic_gpu_registers as rg

WIDTH = 64
COUNT = WIDTH // 2  # numbers of one thread


class _Tile(list):
    shape = (rg.ROWS, WIDTH)


class _Memory:
    """One thread's view of the buffer: NaN wherever nothing was written."""

    def __init__(self):
        self.words = {}

    def access(self, text, operands):
        at = re.search(r"\[\$\d\+(\d+)\]", text)
        assert at is not None and int(at[1]) % 16 == 0
        places = [int(at[1]) + 4 * i for i in range(4)]
        if "red" in text:
            # One of two instructions for the same four numbers.
            four = f"[$0+{at[1]}], {{$1, $2, $3, $4}}; "
            assert text == (
                "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p red.relaxed.gpu.global.add.v4.f32 "
                + f"{four}@!p st.relaxed.gpu.global.v4.f32 {four}}}"
            )
            _, *new, adds = operands
            if adds:
                new = [
                    np.float32(self.words[place] + x) for place, x in zip(places, new, strict=True)
                ]
            self.words |= dict(zip(places, new, strict=True))
            return None
        if text.startswith("st.global.v4.f32 [$0+"):
            assert operands[0] is self and text.endswith("], {$1, $2, $3, $4};")
            self.words |= dict(zip(places, operands[1:], strict=True))
            return None
        assert text.startswith("ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4+")
        assert operands == [self]
        return [self.words.get(place, np.float32(np.nan)) for place in places]


def _operations(monkeypatch):
    """The builders of both modules, as functions of numbers."""
    arith = types.SimpleNamespace(
        addf=lambda a, b: np.float32(a + b),
        subf=lambda a, b: np.float32(a - b),
        select=lambda which, a, b: a if which else b,
        extui=lambda kind, which: int(which),
    )
    llvm = types.SimpleNamespace(
        StructType=types.SimpleNamespace(get_literal=lambda kinds: None),
        extractvalue=lambda kind, found, place: found[place[0]],
    )
    ir = types.SimpleNamespace(Type=types.SimpleNamespace(parse=lambda text: None))
    for name, value in {
        "inline": lambda **_: lambda body: lambda *given: body(None, *given),
        "numbers": list,
        "from_numbers": lambda found, shape, layout: _Tile(found),
        "scalar": lambda value: value,
        "real": np.float32,
        "f32": lambda: None,
        "i32": lambda: None,
        "asm": lambda kind, given, text, *_, **__: given[0].access(text, given),
        "arith": arith,
    }.items():
        monkeypatch.setattr(rg, name, value)
    for name, value in {"arith": arith, "llvm": llvm, "ir": ir}.items():
        monkeypatch.setattr(mosaic_gpu_kept, name, value)
    monkeypatch.setattr(mosaic_gpu_kept, "own_place", lambda memory: ("global", memory, "l"))


def _joined(runs, last):
    """What a thread has after so many runs, and what its pairs hold."""
    memory = _Memory()
    for number, run in enumerate(runs):
        mosaic_gpu_kept.keep_pair(_Tile(run), memory, number > 0)
    found = mosaic_gpu_kept.joined_pair(_Tile(last), memory, len(runs) > 0)
    return np.array(found, np.float32), memory


def _exact(runs, last):
    every = [*runs, last]
    return [sum(Fraction(float(tile[i])) for tile in every) for i in range(COUNT)]


@pytest.mark.parametrize("runs", (0, 1, 2, 5, 18))
def test_pairs_are_rounded_once(monkeypatch, runs):
    _operations(monkeypatch)
    draw = np.random.default_rng(runs)
    sizes = 2.0 ** draw.integers(-12, 13, (runs + 1, COUNT))
    *tiles, last = (draw.standard_normal((runs + 1, COUNT)) * sizes).astype(np.float32)
    found, memory = _joined(tiles, last)
    largest = np.abs([*tiles, last]).sum(axis=0)
    for mine, wanted, mass in zip(found, _exact(tiles, last), largest, strict=True):
        # Half a unit in the last place of the sum itself, and 2⁻⁴⁸ of all magnitudes (F4).
        error = abs(Fraction(float(mine)) - wanted)
        low = Fraction(2) ** -48 * (runs + 1) * (runs + 2) * Fraction(float(mass)) / 2
        assert error <= Fraction(2) ** -24 * abs(wanted) + low
    # Each thread's words: four of each 16 bytes of 128 threads, all high ones before the low ones.
    bytes_each = 4 * rg.ROWS * WIDTH
    starts = range(0, bytes_each, 16 * rg.WARPGROUP)
    assert len(starts) * 4 == COUNT
    every = {start + 4 * i for start in starts for i in range(4)}
    wanted = every | {bytes_each + place for place in every} if runs else set()
    assert set(memory.words) == wanted


def test_pairs_lose_nothing_beside_sums_that_cancel(monkeypatch):
    _operations(monkeypatch)
    big, one = np.full(COUNT, 2.0**26, np.float32), np.ones(COUNT, np.float32)
    found, _ = _joined([-big, one, one, one, one], big)
    np.testing.assert_array_equal(found, 4.0)
    # One word loses all of them.
    total = -big
    for tile in (one, one, one, one, big):
        total = total + tile
    np.testing.assert_array_equal(total, 0.0)


@pytest.mark.parametrize("paired", (False, True))
@pytest.mark.parametrize("runs", (1, 2, 5))
def test_sums_in_memory_are_those_of_registers(monkeypatch, runs, paired):
    # Of rows too wide for two sums in registers: groups gathered in memory, then passed on.
    _operations(monkeypatch)
    draw = np.random.default_rng(runs)
    sizes = 2.0 ** draw.integers(-12, 13, (runs, 3, COUNT))
    groups = (draw.standard_normal((runs, 3, COUNT)) * sizes).astype(np.float32)
    far, outer, wanted = _Memory(), _Memory(), _Memory()
    for number, run in enumerate(groups):
        for group, tile in enumerate(run):
            mosaic_gpu_kept.gather(_Tile(tile), outer, group > 0)
        options = {"width": WIDTH, "paired": paired}
        mosaic_gpu_kept.pass_on(outer, far, number > 0, **options)
        # As registers add, one group after another.
        total = _Tile((run[0] + run[1]) + run[2])
        if paired:
            mosaic_gpu_kept.keep_pair(total, wanted, number > 0)
        else:
            joined = mosaic_gpu_kept.joined(total, wanted, number > 0)
            mosaic_gpu_kept.keep(joined, wanted)
    assert len(far.words) == (1 + paired) * COUNT and far.words == wanted.words


class _Shared:
    """A warpgroup's buffer in bytes, for one thread at a time."""

    def __init__(self):
        self.words, self.thread = {}, 0

    def access(self, text, operands):
        at = re.search(r"\[\$\d\+(\d+)\]", text)
        assert at is not None
        place, four = operands[0] + int(at[1]), ".v4." in text
        places = [place + 4 * i for i in range(4 if four else 1)]
        if text.startswith("st."):
            for where, number in zip(places, operands[1:], strict=True):
                # The four threads of a row may write it, with the same number.
                assert self.words.setdefault(where, number) == number
            return None
        assert text.startswith("ld.relaxed.gpu.global.")
        found = [self.words[where] for where in places]
        return found if four else found[0]


def test_shares_wait_where_another_block_reads_them(monkeypatch):
    _operations(monkeypatch)
    memory = _Shared()
    whole = {
        "addi": lambda a, b: a + b,
        "shli": lambda a, b: a << b,
        "shrui": lambda a, b: a >> b,
        "andi": lambda a, b: a & b,
        "extui": lambda kind, a: a,
    }
    for name, operation in whole.items():
        monkeypatch.setattr(rg.arith, name, operation, raising=False)
    monkeypatch.setattr(rg, "integer", int)
    monkeypatch.setattr(rg, "thread", lambda: memory.thread)
    monkeypatch.setattr(rg, "asm", lambda kind, given, text, *_, **__: memory.access(text, given))
    mosaic_gpu_kept.ir.IntegerType = types.SimpleNamespace(get_signless=lambda bits: None)
    mosaic_gpu_kept.llvm.ptrtoint = lambda kind, pointer: 0
    utils = types.SimpleNamespace(memref_ptr=lambda ref: None)
    monkeypatch.setattr(mosaic_gpu_kept, "mgpu", types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(
        mosaic_gpu_kept, "own_place", lambda ref: ("global", 16 * memory.thread, "l")
    )
    draw = np.random.default_rng(0)
    tiles = draw.standard_normal((rg.WARPGROUP, COUNT)).astype(np.float32)
    high, low = draw.standard_normal((2, rg.ROWS)).astype(np.float32) * [[1], [2.0**-25]]
    high, low = high.astype(np.float32), low.astype(np.float32)
    # Where the matrix unit puts rows: thread 32w + l has rows 16w + l/4 and that + 8.
    rows = [16 * (t // 32) + t % 32 // 4 + np.array([0, 8]) for t in range(rg.WARPGROUP)]
    for memory.thread in range(rg.WARPGROUP):
        mine = rows[memory.thread]
        mosaic_gpu_kept.keep_share(_Tile(tiles[memory.thread]), high[mine], low[mine], memory)
    size = rg.ROWS * WIDTH + mosaic_gpu_kept.SHARE_WORDS
    assert sorted(memory.words) == list(range(0, 4 * size, 4))
    more, less = np.float32(0.7), np.float32(2.0**-26)
    for memory.thread in range(rg.WARPGROUP):
        mine, own = rows[memory.thread], _Tile([np.float32(1)] * COUNT)
        total, sums, rest = mosaic_gpu_kept.joined_share(own, [more] * 2, [less] * 2, memory)
        np.testing.assert_array_equal(total, np.float32(1) + tiles[memory.thread])
        for found, lower, row in zip(sums, rest, mine, strict=True):
            wanted = sum(Fraction(float(x)) for x in (high[row], low[row], more, less))
            # All that is lost is what low words round, none above 2⁻²².
            error = Fraction(float(found)) + Fraction(float(lower)) - wanted
            assert abs(error) <= 2 * Fraction(2) ** (-24 - 22)
