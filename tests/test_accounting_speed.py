"""The benchmark of the accountant runs, checks its answers and writes one line."""

import json
import os
import subprocess
import sys

from tests.pins import ROOT


def test_accounting_speed_smoke_answers_its_questions(tmp_path):
    done = subprocess.run(
        (
            *(sys.executable, ROOT / "experiments" / "accounting_speed.py"),
            *("--smoke", "--results", tmp_path),
        ),
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (tmp_path / "accounting_speed.jsonl").read_text().splitlines()
    metrics = {row["question"]: row for row in json.loads(line)["metrics"]}
    assert len(metrics) == 5
    by_rdp, by_loss = (
        metrics[f"epsilon of one training run by {name}"]["epsilon"]
        for name in ("RDP", "loss distributions")
    )
    assert by_loss <= by_rdp <= 1.0
