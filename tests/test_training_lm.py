"""`experiments/train_lm.py` runs on a small scale, and its text and baselines are what they say."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np

from tests.pins import ROOT
from tests.test_experiments import _smoke


def _without_times(line):
    return [{key: row[key] for key in row if "seconds" not in key} for row in line["metrics"]]


def test_train_lm_smoke_keeps_to_its_target_and_resumes_to_the_same_numbers(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    line = _smoke("train_lm", whole, "--epsilons", "2", "--no-checkpoints")
    command = (sys.executable, ROOT / "experiments" / "train_lm.py", "--smoke", "--results")
    command += (tmp_path, "--epsilons", "2", "--minutes", "0")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the same command goes on" in done.stdout, done.stderr
    assert not (tmp_path / "train_lm.jsonl").exists()
    resumed = _smoke("train_lm", tmp_path, "--epsilons", "2")
    assert _without_times(resumed) == _without_times(line)
    final = line["metrics"][0]
    assert final["phase"] == "final" and final["epsilon"] == 2.0
    assert 0 < final["epsilon_pld"] < final["epsilon_rdp"] <= 2.0
    assert final["epsilon_rdp"] > 1.99
    curve = [row for row in line["metrics"] if row["phase"] == "curve"]
    assert [row["step"] for row in curve] == [3, 6]
    assert curve[0]["epsilon_rdp"] < curve[1]["epsilon_rdp"] == final["epsilon_rdp"]
    assert 5 < final["bits_per_byte"] < 8.2
    counted = {row["model"]: row["bits_per_byte"] for row in line["metrics"][3:]}
    assert counted["3-gram"] < counted["unigram"] < 8


def _text():
    path = ROOT / "experiments" / "_text.py"
    spec = importlib.util.spec_from_file_location("_text", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_text"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_ngram_bits_is_witten_bell_as_written_down():
    text = _text()
    records = np.frombuffer(b"abab", np.uint8).astype(np.int16)[None, None, :]
    held_out = np.frombuffer(b"ab", np.uint8).astype(np.int16)[None, :]
    uniform = 1 / 256
    one = {c: (2 + 2 * uniform) / (4 + 2) for c in "ab"}  # 4 symbols, 2 kinds
    first = (1 + 1 * one["a"]) / (1 + 1)  # after the start: one a
    second = (2 + 1 * one["b"]) / (2 + 1)  # after a: two b
    bits = -(math.log2(first) + math.log2(second)) / 2
    assert text.ngram_bits(records, held_out, 2) == np.float64(bits)


def test_corpus_keeps_held_out_files_apart_and_pads_short_ones():
    text = _text()
    documents = text.files()
    apart = [name for name in documents if text.is_held_out(name)]
    assert 0.05 < len(apart) / len(documents) < 0.15
    chunks, files = text.load("chunk", 4), text.load("file", 4)
    kept = {name: content for name, content in documents.items() if name not in apart}
    assert len(files.records) == len(kept)
    assert len(chunks.records) == sum(len(content) // text.WIDTH for content in kept.values())
    assert len(chunks.held_out) == sum(len(documents[name]) // text.WIDTH for name in apart)
    np.testing.assert_array_equal(chunks.held_out, files.held_out)
    short = min(kept, key=lambda name: len(kept[name]))
    row = files.records[sorted(kept).index(short)]
    assert row.shape == (4, text.WIDTH)
    assert int((row[0] >= 0).sum()) == min(len(kept[short]), text.WIDTH)
    assert json.dumps(chunks.digest) == json.dumps(files.digest)
