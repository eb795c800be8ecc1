"""Every experiment's `--smoke` run works and says what it must, without touching the results."""

import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from tests.pins import ROOT

LINE = {"experiment", "config", "metrics", "commit", "jax", "device", "time", "seconds"}


def _smoke(name: str, folder: pathlib.Path, *more: str, flags: str = "", script: str = "") -> dict:
    """Runs an experiment on its small scale and returns the one line that it wrote."""
    program = ROOT / "experiments" / f"{script or name}.py"
    committed = ROOT / "experiments" / "results" / f"{name}.jsonl"
    before = committed.read_bytes() if committed.exists() else b""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        (sys.executable, program, "--smoke", "--results", folder, *more),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = committed.read_bytes() if committed.exists() else b""
    assert after == before, "a smoke run wrote to the committed results"
    (text,) = (folder / f"{name}.jsonl").read_text().splitlines()
    line = json.loads(text)
    assert set(line) == LINE
    assert line["experiment"] == name
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", line["commit"])
    return line


def test_private_memory_smoke_writes_every_mechanism(tmp_path):
    line = _smoke("private_memory", tmp_path, "--figures", str(tmp_path))
    epsilons, delta = line["config"]["epsilons"], line["config"]["delta"]
    rows = {
        (r["dataset"], r["mechanism"], r["epsilon"]): r
        for r in line["metrics"]
        if r["epsilon"] is not None
    }
    names = {
        "GaussianProcessNoise",
        "RandomFeatures",
        "ClippedContributions",
        "IndependentNoise",
        "SoftmaxNoise",
        "NonPrivate",
    }
    wanted = {(d, n, e) for d in ("digits", "breast_cancer") for n in names for e in epsilons}
    assert set(rows) == wanted
    for row in rows.values():
        assert row["delta"] == delta
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["standard_error"] <= 0.5
    # At ε = 1 the correlated noise keeps most of the answer and independent noise loses it.
    assert rows["digits", "GaussianProcessNoise", 1.0]["accuracy"] > 0.8
    assert rows["digits", "IndependentNoise", 1.0]["accuracy"] < 0.4
    picture = tmp_path / "private_memory.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_reference_cost_smoke_compares_with_xla(tmp_path):
    line = _smoke("reference_cost", tmp_path)
    large, *pairs = line["metrics"]
    assert large["keys"] == line["config"]["records"]
    assert 0 < large["peak_gib"] < line["config"]["limit_gib"]
    plain = [row for row in pairs if row["implementation"] == "jax.nn.dot_product_attention"]
    assert plain and len(plain) < len(pairs)
    for row in pairs:
        assert row["seconds"] > 0
        assert math.isfinite(row["time_ratio"]) and math.isfinite(row["peak_ratio"])
        assert (row["time_ratio"], row["peak_ratio"]) == (1, 1) or row not in plain


def test_train_speed_smoke_compares_methods_and_times_one(tmp_path):
    line = _smoke("train_speed", tmp_path)
    (row,) = line["metrics"]
    fields = {"model", "batch", "length", "remat", "method", "microbatch", "milliseconds"}
    assert set(row) == fields | {"temp_bytes", "tokens_per_second", "run_id"}
    assert row["method"] == "plain" and row["milliseconds"] > 0 and row["temp_bytes"] > 0
    rate = 1e3 * row["batch"] * row["length"] / row["milliseconds"]
    # Milliseconds are rounded to a thousandth, tokens to whole ones.
    assert abs(row["tokens_per_second"] - rate) <= 0.5 + rate * 0.0006 / row["milliseconds"]


def test_train_speed_smoke_gives_the_same_sums_and_noise_on_two_devices(tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    options = {"flags": flags, "script": "train_speed"}
    line = _smoke("train_scaling", tmp_path, "--devices", **options)
    rows = line["metrics"]
    assert [(row["devices"], row["mode"], row["batch"]) for row in rows[::3]] == [
        (1, "strong", 4),
        (2, "strong", 4),
        (2, "weak", 8),
    ]
    assert [row["method"] for row in rows] == 3 * ["plain", "one_pass", "private"]
    for row, alone in zip(rows, 3 * rows[:3], strict=True):
        work = row["batch"] / row["devices"] / alone["batch"]
        ratio = work * alone["milliseconds"] / row["milliseconds"]
        assert abs(row["efficiency"] / ratio - 1) < 0.01


def test_attention_scaling_smoke_has_lengths_and_devices(tmp_path):
    line = _smoke("attention_scaling", tmp_path)
    assert [(row["mode"], row["implementation"]) for row in line["metrics"]] == [
        ("length", "private"),
        *((mode, name) for mode in ("strong", "weak") for name in ("records", "sums")),
    ]
    for row in line["metrics"]:
        rate = 1e3 * row["batch"] * row["length"] / row["milliseconds"]
        assert abs(row["tokens_per_second"] / rate - 1) < 0.01
        assert row["spread"] >= 0 and row["devices"] == 1


def test_tune_tiles_smoke_times_tiles_that_are_right(tmp_path):
    table = (ROOT / "dpfa_jax" / "pallas" / "tiles.json").read_bytes()
    line = _smoke("tune_tiles", tmp_path)
    assert len(line["metrics"]) == 8 and sum(row["used"] for row in line["metrics"]) == 4
    assert {row["pass"] for row in line["metrics"]} == {"forward", "backward"}
    assert (ROOT / "dpfa_jax" / "pallas" / "tiles.json").read_bytes() == table


def test_tune_cuts_smoke_lowers_the_cut_in_use_and_whole_tiles(tmp_path):
    line = _smoke("tune_cuts", tmp_path)
    other, used = line["metrics"]
    assert used["change"] == "used"
    assert [name for name in used["cut"] if used["cut"][name] != other["cut"][name]] == ["shares"]


@pytest.mark.parametrize("name", ["private_memory", "reference_cost"])
def test_experiment_writes_no_line_when_its_check_fails(name, tmp_path):
    # The check compares with float64; an answer that is off by a factor must stop the run.
    broken = (
        "import runpy, sys, jax\n"
        "import dpfa_jax as dp\n"
        "true = dp.private_attention\n"
        "dp.private_attention = lambda *a, **k: 1.01 * true(*a, **k)\n"
        f"sys.argv = ['x', '--smoke', '--results', {str(tmp_path)!r}]\n"
        f"sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        f"runpy.run_path({str(ROOT / 'experiments' / name)!r} + '.py', run_name='__main__')\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        (sys.executable, "-c", broken),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "float64" in done.stderr, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


_MACHINE_CODE = """
.L_x_1:
        /*0000*/                   R2UR UR4, R0 ;
.L_x_2:
        /*0010*/                   LDL R3, [R1] ;
        /*0020*/              @P1 R2UR UR6, R5 ;
        /*0030*/                   {} R24, R4, gdesc[UR4], R24 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   STL [R1], R3 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   R2UR UR4, R0 ;
        /*0080*/               @P2 BRA `(.L_x_3) ;
        /*0090*/               @P2 BRA `(.L_x_4) ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
.L_x_4:
"""


@pytest.mark.parametrize(
    ("product", "detours"), [("HGMMA.64x64x16", 2), ("QGMMA.64x64x32", 2), ("FFMA", 0)]
)
def test_make_aot_counts_detours_of_innermost_loops_with_products(product, detours, monkeypatch):
    # The script says which devices there are.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    script = runpy.run_path(str(ROOT / "experiments" / "compile_kernels.py"))
    assert script["_detours"](_MACHINE_CODE.format(product)) == detours
