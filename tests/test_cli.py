"""The command line: the library's numbers, a guess for every typo, and never a traceback."""

import json
import math
import random
import subprocess
import sys

import pytest

from dpfa_jax import accounting, cli, planning
from dpfa_jax.accounting import (
    Gaussian,
    Laplace,
    PoissonSampled,
    Repeated,
    attacker,
    groups,
    ledger,
    pld,
)

RUN = ["--noise-multiplier", "1", "--sampling-rate", "0.01", "--steps", "1000"]


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_epsilon_prints_what_the_library_computes(capsys):
    found = run_json(capsys, "epsilon", *RUN, "--delta", "1e-5")
    event = Repeated(PoissonSampled(Gaussian(1.0), 0.01), 1000)
    assert ledger.from_json(found["event"]) == event
    assert found["accounts"]["RDP"] == accounting.epsilon(event, 1e-5)
    assert found["epsilon"] == found["accounts"]["privacy loss distribution"]
    assert found["adjacency"] == "ZERO_OUT"
    status, out, err = run(capsys, "epsilon", *RUN, "--delta", "1e-5")
    assert status == 0 and err == ""
    assert "1.828" in out and "2.101" in out


def test_epsilon_of_every_kind_of_sampling(capsys):
    plain = run_json(capsys, "epsilon", "--noise-multiplier", "3.8", "--delta", "1e-5")
    assert 0.9 < plain["epsilon"] < 1.0
    sized = ["--records", "1000", "--batch-size", "10", "--delta", "1e-5"]
    poisson = run_json(capsys, "epsilon", "--noise-multiplier", "1", *sized)
    assert ledger.from_json(poisson["event"]).event == PoissonSampled(Gaussian(1.0), 0.01)
    fixed = run_json(
        capsys,
        *["epsilon", "--sampling", "without-replacement", "--noise-std", "2"],
        *["--clip-norm", "0.5", *sized],
    )
    assert ledger.from_json(fixed["event"]).event == accounting.SampledWithoutReplacement(
        2.0, 0.5, 10, 1000
    )
    assert fixed["adjacency"] == "REPLACE_ONE"


def test_epsilon_without_noise_is_infinite(capsys):
    found = run_json(capsys, "epsilon", "--noise-multiplier", "0", "--delta", "1e-5")
    assert found["epsilon"] == "inf"


def test_calibrate_finds_the_private_side(capsys):
    noise = run_json(capsys, "calibrate", "--epsilon", "1", "--delta", "1e-5")
    assert accounting.epsilon(Gaussian(noise["value"]), 1e-5) <= 1.0
    for find in ("steps", "sampling-rate", "batch-size"):
        arguments = ["calibrate", "--find", find, "--epsilon", "1.5", "--delta", "1e-5"]
        arguments += ["--noise-multiplier", "1"]
        if find == "steps":
            arguments += ["--sampling-rate", "0.01"]
        else:
            arguments += ["--steps", "300", "--records", "2000"]
        found = run_json(capsys, *arguments)
        event = ledger.from_json(found["event"])
        assert accounting.epsilon(event, 1e-5) == found["epsilon"] <= 1.5
        assert found["epsilon"] >= 1.3
        assert found["value"] > 0
    fixed = run_json(
        capsys,
        *["calibrate", "--sampling", "without-replacement", "--clip-norm", "1", "--records"],
        *["1000", "--batch-size", "10", "--steps", "10", "--epsilon", "2", "--delta", "1e-5"],
    )
    assert fixed["find"] == "noise-std"
    assert accounting.epsilon(ledger.from_json(fixed["event"]), 1e-5) <= 2.0


def test_calibrate_by_the_loss_distribution_needs_less_noise(capsys):
    arguments = ["calibrate", "--sampling-rate", "0.05", "--steps", "50", "--epsilon", "2"]
    arguments += ["--delta", "1e-5"]
    rdp, loss = (
        run_json(capsys, *arguments, "--accountant", accountant) for accountant in ("rdp", "pld")
    )
    assert loss["value"] < rdp["value"] and loss["accountant"] == "pld"
    assert pld.epsilon(ledger.from_json(loss["event"]), 1e-5) == loss["epsilon"] <= 2.0


def test_groups_and_radius_bits_are_charged(capsys):
    run_of = ["epsilon", "--noise-multiplier", "4", "--sampling-rate", "0.01", "--delta", "1e-6"]
    group = run_json(capsys, *run_of, "--group-rows", "3")
    assert ledger.from_json(group["event"]) == Repeated(
        groups.grouped(PoissonSampled(Gaussian(4.0), 0.01), 3), 1
    )
    assert "GROUP(3)" in group["adjacency"]
    long = ["--steps", "100000", "--coordinates", "100000000"]
    assert run_json(capsys, *run_of, *long)["epsilon"] == "inf"
    assert run_json(capsys, *run_of, *long, "--radius-bits", "64")["epsilon"] < 4.0


def test_training_memory_grows_with_the_model_and_the_batch():
    small, large = planning.training_memory(10**6), planning.training_memory(10**9, 64)
    assert large["weights"] == 1000 * small["weights"] == 4e9
    assert large["per-example gradients, if materialised"] == 64 * 4e9
    assert planning.bytes_as_text(4e9) == "3.725 GiB" and planning.bytes_as_text(5) == "5 B"
    assert planning.bytes_as_text(1e20).endswith("TiB")
    for bad in (0, -1):
        with pytest.raises(ValueError, match="parameters"):
            planning.training_memory(bad)


def test_plan_gives_tables_memory_and_a_figure(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = ["plan", "--noise-multiplier", "1", "--records", "10000", "--batch-size", "100"]
    arguments += ["--steps", "100", "--delta", "1e-5", "--parameters", "1e6"]
    found = run_json(capsys, *arguments, "--figure", str(picture))
    for name, rising in (("steps", True), ("noise multiplier", False), ("batch size", True)):
        costs = [epsilon for _, epsilon in found["tables"][name]]
        assert costs == sorted(costs, reverse=not rising)
    assert found["memory_bytes"]["per-example gradients, if materialised"] == 4e8
    assert picture.stat().st_size > 1000
    assert 0 < found["attacker"]["advantage"] < 1
    assert [size for size, _ in found["tables"]["batch size"]] == [25, 50, 100, 200, 400]
    odds, belief = found["attacker"]["odds_factor"], found["attacker"]["belief_from_one_half"]
    assert belief == pytest.approx(odds / (1 + odds)) and belief < 1
    curve = found["trade_off"]
    event = ledger.from_json(found["event"])
    for rate, reached in zip(
        curve["false_positive_rates"], curve["true_positive_rates"], strict=True
    ):
        assert reached >= attacker.true_positive_rate(event, rate)


def test_verify_recomputes_epsilon_from_the_file(capsys, tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, Gaussian(4.0), 3, label="layer 0")
    head = ledger.append(path, Laplace(9.0), label="count").head
    found = run_json(capsys, "verify", str(path), "--delta", "1e-5", "--head", head)
    assert found["entries"] == 2 and found["head"] == head
    assert list(found["by_label"]) == ["layer 0", "count"]
    history = ledger.verify(path).history
    assert found["epsilon"] == accounting.report(history.event, 1e-5).epsilon
    path.write_text(path.read_text().replace("4.0", "8.0"))
    status, out, err = run(capsys, "verify", str(path), "--delta", "1e-5")
    assert status == 2 and out == "" and "line 1" in err


def test_explain_says_what_is_not_protected(capsys):
    for setup in ("memory", "sequence", "sampled", "training"):
        found = run_json(capsys, "explain", setup)
        assert found["protected"] and len(found["not_protected"]) >= 4
        _, out, _ = run(capsys, "explain", setup)
        for sentence in found["not_protected"]:
            assert sentence in out


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["epsilom"], "epsilon"),
        (["epsilon", "--noise-multipler", "1"], "--noise-multiplier"),
        (["epsilon", "--noise-multipler=1"], "--noise-multiplier"),
        (["calibrate", "--find", "stepz"], "steps"),
        (["plan", "--samplingrate", "1"], "--sampling-rate"),
        (["explain", "trainin"], "training"),
        (["epsilon", "--sampling", "poison"], "poisson"),
        (["epsilon", "--group-row", "2"], "--group-rows"),
        (["calibrate", "--accountant", "pdl"], "pld"),
    ],
)
def test_a_typo_gets_a_guess(capsys, arguments, guess):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert f"Did you mean {guess}?" in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["epsilon", "--noise-multiplier", "1"], "--delta is missing"),
        (["epsilon", "--delta", "1e-5"], "--noise-multiplier is missing"),
        (["epsilon", *RUN, "--delta", "nan"], "delta"),
        (["epsilon", *RUN, "--delta", "0"], "delta"),
        (["epsilon", *RUN, "--delta", "x"], "expected a number"),
        (["epsilon", *RUN, "--delta", "1e-5", "--steps", "0"], "count"),
        (["epsilon", *RUN, "--delta", "1e-5", "--steps", "1.5"], "whole number"),
        (["epsilon", *RUN, "--delta", "1e-5", "--steps", "1e999"], "whole number"),
        (["epsilon", *RUN, "--delta", "1e-5", "--sampling", "shuffle"], "Poisson"),
        (["epsilon", *RUN, "--delta", "1e-5", "--sampling", "none"], "takes no"),
        (["epsilon", *RUN, "--delta", "1e-5", "--batch-size", "3"], "not both"),
        (["epsilon", *RUN, "--delta", "1e-5", "--capacity", "3"], "--records"),
        (["epsilon", *RUN, "--delta", "1e-5", "--noise-std", "3"], "without-replacement"),
        (
            ["epsilon", *RUN, "--delta", "1e-5", "--sampling", "without-replacement"],
            "two ways",
        ),
        (["epsilon", "--noise-multiplier", "-1", "--delta", "1e-5"], "noise_multiplier"),
        (["epsilon", *RUN, "--delta", "1e-5", "--group-rows", "0"], "rows"),
        (
            ["epsilon", *RUN, "--delta", "1e-5", "--coordinates", "9", "--radius-bits", "32"],
            "radius_bits",
        ),
        (["calibrate", "--epsilon", "1"], "--delta is missing"),
        (["calibrate", "--epsilon", "-1", "--delta", "1e-5"], "epsilon"),
        (["calibrate", *RUN, "--epsilon", "1", "--delta", "1e-5"], "leave it out"),
        (
            "calibrate --find steps --noise-multiplier 0.1 --epsilon 1 --delta 1e-5".split(),
            "Not one step",
        ),
        (["calibrate", "--epsilon", "0", "--delta", "1e-300", "--steps", "9"], "even there"),
        (["verify", "/no/such/file", "--delta", "1e-5"], "/no/such/file"),
        (["verify"], "file"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, part):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert part in err and "Traceback" not in err
    assert err.startswith("dpfa-jax: ") and err.count("\n") == 1


def test_no_flags_and_help_print_the_commands(capsys):
    assert run(capsys)[0] == 2
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in ("epsilon", "calibrate", "plan", "verify", "explain"):
        assert name in out
        assert run(capsys, name, "--help")[0] == 0


def test_random_words_never_raise(capsys, tmp_path):
    """300 random command lines end in status 0 or 2, and none reports ε = 0 for a real release."""
    rng = random.Random(5)
    flags = ["--noise-multiplier", "--steps", "--sampling", "--sampling-rate", "--batch-size"]
    flags += ["--records", "--capacity", "--coordinates", "--delta", "--epsilon", "--find", "--x"]
    flags += ["--group-rows", "--radius-bits"]
    words = [
        "1",
        "0",
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "",
        "1e-5",
        "0.5",
        "10",
        "abc",
        "poisson",
    ]
    words += ["none", "without-replacement", "steps", "1e-400", "10" * 200]
    for _ in range(300):
        arguments = [rng.choice(["epsilon", "calibrate", "plan", "explain", "verify"])]
        for _ in range(rng.randrange(6)):
            arguments += [rng.choice(flags), rng.choice(words)]
        status, out, err = run(capsys, *arguments, "--json")
        assert status in (0, 2), arguments
        assert "Traceback" not in out + err
        if status == 0 and arguments[0] == "epsilon":
            found = json.loads(out)
            assert found["epsilon"] == "inf" or found["epsilon"] >= 0
            if found["epsilon"] == 0:
                event = ledger.from_json(found["event"])
                curve = accounting.rdp_curve(event, 2.0)[0]
                rates = [arguments[i + 1] for i, a in enumerate(arguments) if "rate" in a]
                assert curve < 1 or rates[-1:] in (["0"], ["1e-400"])


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "dpfa_jax", "calibrate", "--epsilon", "1", "--delta", "1e-5"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("noise-multiplier = 3.7306")
    assert math.isfinite(float(done.stdout.split()[2]))
