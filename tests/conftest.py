"""What every test runs under: a CPU that looks like eight devices, checked shapes, fixed examples.

The environment is set before anything imports JAX. A value already in the environment wins, which
is how `make test-gpu` puts the same tests on a GPU.
"""

import importlib.util
import os
import sys

import hypothesis
import jaxtyping
import pytest

if "jax" in sys.modules or "dpfa_jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its devices.")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_EIGHT_DEVICES = "--xla_force_host_platform_device_count"
if _EIGHT_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}=8".strip()

# Shapes and types in signatures are checked at run time, in every module of the package. An int
# is taken where a float is asked for, as type checkers do. Only a GPU machine may lack beartype:
# the same functions are checked on the CPU.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_HAS_CHECKER = importlib.util.find_spec("beartype") is not None
if not _HAS_CHECKER and os.environ["JAX_PLATFORMS"] == "cpu":
    raise RuntimeError(
        "beartype is missing, signatures would go unchecked. `make test` installs it."
    )
jaxtyping.install_import_hook("dpfa_jax", _CHECKER if _HAS_CHECKER else None)

# The same examples on every machine and in every run; no example data base, no time limit.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("deterministic")


def _has_gpu() -> bool:
    import jax

    return any(device.platform == "gpu" for device in jax.devices())


def pytest_report_header() -> str:
    checked = "checked by beartype" if _HAS_CHECKER else "NOT checked: beartype is missing"
    return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}, signatures {checked}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `gpu` tests where there is no GPU; asking for nothing else is an error."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu or _has_gpu():
        return
    if config.getoption("markexpr") == "gpu":
        raise pytest.UsageError(
            "The tests marked gpu need an NVIDIA GPU, and JAX sees none "
            f"(JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}). Run `make test-gpu` on a machine "
            "with a GPU."
        )
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
