"""Which statement does this file keep true? The house of CONTRIBUTING.md stands as drawn.

Everything here reads source, except two tests that import: nothing is found by running the library.
"""

import ast
import collections
import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.pins import PACKAGE, ROOT

# From the bottom up. A module may import rows above it in this list, never its own row or a later
# one. A module that stands in no row is an error; a row may name what is not written yet.
LAYERS = (
    "_typing _check box_muller float8 pallas.ptx",
    "adjacency random",
    "_primitives doubleword pallas.mosaic_gpu_registers",
    # layer 1, its packages from the inside out
    "sensitivity mechanisms auditing.bounds auditing.attacks clipping.rows clipping.partition"
    " clipping.packed accounting.event accounting.scope accounting.gdp accounting.rdp"
    " pallas.tiling pallas.blocks pallas.mosaic_gpu_products pallas.mosaic_gpu_kept",
    "lattice pallas.mosaic_gpu_blocks pallas.mosaic_gpu_masks pallas.mosaic_gpu_noise"
    " pallas.mosaic_gpu_rows",
    "pallas.accumulators",
    "pallas.mosaic_gpu_shares",
    "pallas.mosaic_gpu_plan",
    "pallas.mosaic_gpu_answers pallas.mosaic_gpu_copies pallas.mosaic_gpu_memory",
    "accounting.convert accounting.subsample auditing clipping.certificate"
    " clipping._batch per_example.plan pallas.norms"
    " pallas.triton_kernels pallas.triton_records pallas.mosaic_gpu_kernels"
    " pallas.mosaic_gpu_gradient_blocks",
    "per_example.norms",
    "per_example.rules per_example.keep",
    "pallas.triton_gradients pallas.triton_calls pallas.mosaic_gpu_gradient_kernels"
    " pallas.mosaic_gpu_records pallas.mosaic_gpu_columns"
    " clipping.groups clipping.adaptive",
    "per_example.evaluate clipping.bounded",
    "per_example",
    "clipping.two_pass",
    "clipping.one_pass",
    "clipping.gradients",
    "accounting.charge accounting.groups accounting.upward pallas.triton",
    "pallas.mosaic_gpu_gradients",
    "pallas.mosaic_gpu",
    "accounting.state accounting.trace accounting.traced accounting.calibrate accounting.filters"
    " accounting.allocate accounting.ledger accounting.pld accounting.attacker pallas",
    "accounting.report clipping",
    "accounting gaussian_process",
    # layers 2 to 7
    "arguments shards",
    "guarantee",
    "releases sampling",
    "reference admission",
    "attention",
    "memory.rows memory.history context",
    "memory.gaussian_process memory.random_features memory.filtered",
    "memory _flax",
    "linen nnx optim.account monitoring planning",
    "optim.plan optim.words",
    "optim.shares",
    "optim.noise",
    "optim.accumulation",
    "optim",
    "cli",
    # layer 8: the package itself
    "__init__ __main__",
)
HOST_ONLY = ("sensitivity", "accounting", "auditing")
_BRINGS_JAX = {"jax", "jaxlib", "flax", "optax", "chex"}
HOST_ONLY_BUT = (
    *("accounting.state", "accounting.trace"),
    *("accounting.traced", "accounting.upward"),
)
AUDITED_BY = ("_check", "_typing", "auditing")
LONGEST = 500
# Where `scale`, even as a field, is that of jax.nn.dot_product_attention.
SCALE_IS_THE_SCORES = ("attention", "memory", "linen", "nnx")
# Backends and their numerics, which callers never see: q, k, v, and a cipher's key is its key.
BELOW_THE_API = ("arguments", "doubleword", "reference", "gaussian_process", "pallas")


def _module_name(path: pathlib.Path) -> str:
    """The module's name inside the package, a folder's for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROWS = {name: row for row, names in enumerate(LAYERS) for name in names.split()}

every_module = pytest.mark.parametrize("module", MODULES)


@functools.cache
def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """What `from ... import` names, dots resolved."""
    if not node.level:
        return node.module or ""
    here = MODULES[module].relative_to(ROOT).parent.parts
    base = list(here[: len(here) - node.level + 1])
    return ".".join(base + ([node.module] if node.module else []))


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Everything a module imports anywhere in its body, by full name, type-checking ones too."""
    found = set()
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                inside = f"{base}.{alias.name}".removeprefix("dpfa_jax.")
                is_module = base.split(".")[0] == "dpfa_jax" and inside in MODULES
                found.add(f"{base}.{alias.name}" if is_module else base)
    return frozenset(found)


def _own_imports(module: str) -> set[str]:
    """The package's own modules among `_imports`."""
    own = set()
    for name in _imports(module):
        if name == "dpfa_jax" or name.startswith("dpfa_jax."):
            own.add(name.removeprefix("dpfa_jax").removeprefix(".") or "__init__")
    return own


def _reached(module: str) -> set[str]:
    """The package's own modules that a module needs, directly or through others."""
    reached, waiting = set(), [module]
    while waiting:
        for name in _own_imports(waiting.pop()) - reached:
            reached.add(name)
            waiting.append(name)
    return reached


def _is_in(module: str, folders: tuple[str, ...]) -> bool:
    return any(module == folder or module.startswith(f"{folder}.") for folder in folders)


def test_layers_name_every_module():
    missing = [name for name in MODULES if name not in ROWS]
    assert not missing, f"Give these modules a row in LAYERS: {missing}"
    assert len(ROWS) == len(" ".join(LAYERS).split()), "a module stands in two rows"


@every_module
def test_imports_point_down(module):
    assert module in ROWS, f"Give {module} a row in LAYERS"
    for name in _own_imports(module):
        assert name in ROWS, f"{module} imports dpfa_jax.{name}, which has no row"
        assert ROWS[name] < ROWS[module], (
            f"dpfa_jax.{module} may not import dpfa_jax.{name}: it stands beside it or above"
        )


@every_module
def test_host_modules_import_no_jax(module):
    if not _is_in(module, HOST_ONLY) or module in HOST_ONLY_BUT:
        return
    # A package's __init__ gathers state and trace as well; what counts is what a formula needs.
    needed = {module} if MODULES[module].name == "__init__.py" else {module} | _reached(module)
    for name in needed:
        foreign = {full.split(".")[0] for full in _imports(name)} & _BRINGS_JAX
        assert not foreign, f"dpfa_jax.{module} is host float64 and reaches {foreign} in {name}"


@every_module
def test_auditing_imports_nothing_it_audits(module):
    if _is_in(module, ("auditing",)):
        audited = {name for name in _own_imports(module) if not _is_in(name, AUDITED_BY)}
        assert not audited, f"dpfa_jax.{module} would inherit a bug of {audited}"


def test_import_loads_no_framework():
    # jax.extend, where PRNG implementations are registered, loads a part of Pallas by itself.
    code = (
        "import json, sys, jax.extend; before = set(sys.modules); import dpfa_jax; "
        "print(json.dumps([dpfa_jax.__file__, sorted(set(sys.modules) - before)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    where, loaded = json.loads(done.stdout)
    assert pathlib.Path(where).is_relative_to(ROOT)
    assert "dpfa_jax" in loaded
    heavy = {"flax", "optax", "dp_accounting", "pallas"}
    assert not [name for name in loaded if heavy & set(name.split("."))]


def test_init_only_reexports():
    first, *rest = _tree(MODULES["__init__"]).body
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    for node in rest:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        assert _absolute("__init__", node).split(".")[0] == "dpfa_jax", ast.unparse(node)
        for alias in node.names:
            assert alias.asname == alias.name, f"write `{alias.name} as {alias.name}`"


def _python_files() -> list[pathlib.Path]:
    folders = (PACKAGE, ROOT / "tests", ROOT / "experiments")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


every_file = pytest.mark.parametrize(
    "path", _python_files(), ids=lambda path: str(path.relative_to(ROOT))
)


@every_file
def test_file_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it"


def _exception_names(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"everything"}
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}


@every_file
def test_errors_are_not_swallowed(path):
    broad = {"everything", "Exception", "BaseException", "ImportError", "ModuleNotFoundError"}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler) and _exception_names(node) & broad:
            idle = all(
                isinstance(line, ast.Pass | ast.Continue)
                or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            assert not idle, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            suppressed = {ast.unparse(argument) for argument in node.args}
            assert not suppressed & broad, f"line {node.lineno}: {ast.unparse(node)}"


@every_module
def test_guarantees_are_not_warnings(module):
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("warnings.warn", "warn"), f"line {node.lineno}: raise instead"


@every_module
def test_module_holds_no_mutable_state(module):
    tree = _tree(MODULES[module])
    written = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert not written, f"global statement in lines {written}"
    loaded = importlib.import_module(f"dpfa_jax.{module}".removesuffix(".__init__"))
    mutable = (list, dict, set, bytearray, collections.deque)
    owners = [("", loaded)] + [
        (f"{name}.", value)
        for name, value in vars(loaded).items()
        if isinstance(value, type) and value.__module__ == loaded.__name__
    ]
    for prefix, owner in owners:
        for name, value in vars(owner).items():
            if name.startswith("__") or name in _MADE_BY_DECORATORS:
                continue
            where = f"{prefix}{name} in dpfa_jax.{module}"
            assert not isinstance(value, mutable), f"{where}: a tuple or MappingProxyType, please"
            if isinstance(value, np.ndarray):
                assert not value.flags.writeable, f"{where}: call setflags(write=False)"


# What dataclasses, NamedTuple, flax and beartype leave in a class of their own accord.
_MADE_BY_DECORATORS = frozenset({"_field_defaults", "_fields", "_pytree__nodes", "_abc_impl"})


def _public_signatures(module: str) -> list[tuple[str, dict[str, str]]]:
    """(name, {parameter or field: annotation}) of everything a caller can spell."""
    found = []

    def visit(body, prefix, is_class):
        fields = {}
        for node in body:
            if isinstance(node, ast.FunctionDef):
                if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                    continue
                given = node.args
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                names += [extra for extra in (given.vararg, given.kwarg) if extra]
                found.append(
                    (
                        prefix + node.name,
                        {n.arg: ast.unparse(n.annotation) if n.annotation else "" for n in names},
                    )
                )
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{prefix}{node.name}.", True)
            elif is_class and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = ast.unparse(node.annotation)
        if is_class:
            found.append((prefix.rstrip("."), fields))

    if not module.startswith("_") and not _is_in(module, BELOW_THE_API):
        visit(_tree(MODULES[module]).body, "", False)
    return found


@every_module
def test_signatures_name_no_ambiguous_factor(module):
    for name, parameters in _public_signatures(module):
        where = f"dpfa_jax.{module}: {name}"
        for word in ("sigma", "budget"):
            assert word not in parameters, f"{where} takes {word}: off by a factor for someone"
        if "scale" in parameters and not _is_in(module, SCALE_IS_THE_SCORES):
            attends = parameters.keys() & {"query", "key", "q", "k"}
            assert attends, f"{where} takes scale and attends to nothing: scale of what?"


@every_module
def test_signatures_call_a_random_key_rng(module):
    for name, parameters in _public_signatures(module):
        where = f"dpfa_jax.{module}: {name}"
        if "key" in parameters and name != "chacha_block":  # the key of RFC 8439, eight words
            assert parameters.keys() & {"query", "value", "q", "v"}, f"{where}: say rng"
        for parameter, annotation in parameters.items():
            if re.search(r"PRNGKey|\bKey\[", annotation):
                assert "rng" in parameter, f"{where}: {parameter} is a PRNG key, say rng"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


# Written so that they do not match themselves.
_PACKAGE_HOSTS = re.compile(
    r"""https?://[^\s)"'<>]*(?:/simple/|/packages/[0-9a-f]{2}/)"""
    r"|py[p]i\.org|python[h]osted\.org|registry\.[n]pmjs\.|deb[.]debian\.org|proxy\.[g]olang",
    re.IGNORECASE,
)
_MACHINE_PATHS = re.compile(r"(?<![\w.~/-])/(?:root|home|Users|work|opt|tmp|mnt|srv)/\w")


def test_tracked_files_name_no_machine_and_no_registry():
    here = [re.escape(f"{folder}/") for folder in (ROOT, pathlib.Path.home())]
    own = re.compile(r"(?<![\w.])(?:" + "|".join(here) + ")")
    bad = []
    for name in _git("ls-files", "-z").split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if any(found.search(line) for found in (_PACKAGE_HOSTS, _MACHINE_PATHS, own)):
                bad.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)
