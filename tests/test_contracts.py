"""Which statement does this file keep true? What is promised is written, pinned, tested and run.

Docstrings carry the sections their signatures call for; proof notes name functions that exist with
the digests they have now, and tests that exist and run; every example in a docstring gives what it
says.
"""

import ast
import collections
import dataclasses
import doctest
import functools
import importlib
import pathlib
import re

import pytest

from tests import pins
from tests.pins import PACKAGE, ROOT
from tests.test_architecture import BELOW_THE_API

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Guarantee", "Source", "Example")
PARTS = ("Needs", "Says", "Proof", "Floats")

_SECTION = re.compile(rf"^(?P<name>{'|'.join(SECTIONS)})s?:(?P<rest>.*)$")
_ENTRY = re.compile(r"^ {2}(?P<names>[*\w][*\w, ]*?)(?: \([^)]*\))?:")
_CITED = re.compile(r"\b[A-Z]+\d+[a-z]?\b")


@dataclasses.dataclass(frozen=True)
class Promise:
    """One public definition: where it stands, its syntax, and its docstring's sections."""

    where: str
    name: str
    path: pathlib.Path
    node: ast.FunctionDef | ast.ClassDef
    is_method: bool
    is_api: bool
    summary: str
    sections: dict[str, str]


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    summary, *lines = docstring.splitlines()
    found: dict[str, list[str]] = {}
    current = None
    for line in lines:
        match = _SECTION.match(line)
        if match:
            current = match["name"]
            found[current] = [match["rest"].strip()]
        elif current:
            found[current].append(line)
    return summary, {name: "\n".join(text) for name, text in found.items()}


def _entries(section: str) -> set[str]:
    """The parameters an Args or Attributes section explains; `low, high: ...` explains two."""
    names: set[str] = set()
    for line in section.splitlines():
        match = _ENTRY.match(line)
        if match:
            names.update(name.strip().lstrip("*") for name in match["names"].split(","))
    return names


def _module_name(path: pathlib.Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def _is_public(path: pathlib.Path) -> bool:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return all(not part.startswith("_") or part.startswith("__") for part in parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def _documented(path: pathlib.Path) -> list[tuple[str, ast.AST, str]]:
    """(name, node, docstring) of every module, class and function that has one, however deep."""
    found = []

    def visit(node, name):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((name or "module", node, docstring))
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef)
            visit(child, f"{name}.{child.name}".lstrip(".") if named else name)

    visit(ast.parse(path.read_text()), "")
    return found


def _inherited(owner: ast.ClassDef, name: str, classes: dict[str, ast.ClassDef]) -> str:
    """The docstring of the method that this one overrides, in a base class of the same file."""
    for base in owner.bases:
        parent = classes.get(ast.unparse(base))
        if parent:
            for member in parent.body:
                if isinstance(member, ast.FunctionDef) and member.name == name:
                    return ast.get_docstring(member) or ""
            return _inherited(parent, name, classes)
    return ""


def _promises() -> list[Promise]:
    found = []

    def add(path, node, owner, classes):
        if node.name.startswith("_"):
            return
        name = f"{owner.name}.{node.name}" if owner else node.name
        summary, sections = _sections(ast.get_docstring(node) or "\n")
        if owner:
            sections = _sections(_inherited(owner, node.name, classes) or "\n")[1] | sections
        where = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        # Below the API a first line is enough.
        is_api = path.relative_to(PACKAGE).with_suffix("").parts[0] not in BELOW_THE_API
        found.append(Promise(where, name, path, node, bool(owner), is_api, summary, sections))
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    add(path, member, node, classes)

    for path in MODULES.values():
        if _is_public(path):
            body = ast.parse(path.read_text()).body
            classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
            for node in body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    add(path, node, None, classes)
    return found


PROMISES = _promises()
NOTES = pins.all_notes()

every_promise = pytest.mark.parametrize(
    "promise", PROMISES, ids=lambda p: f"{_module_name(p.path)}.{p.name}"
)
every_note = pytest.mark.parametrize("note", NOTES, ids=lambda n: f"{n.path.stem}-{n.id}")


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    return {ast.unparse(each).partition("(")[0].split(".")[-1] for each in node.decorator_list}


def _parameters(promise: Promise) -> list[str]:
    assert isinstance(promise.node, ast.FunctionDef)
    given = promise.node.args
    names = [arg.arg for arg in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    names += [extra.arg for extra in (given.vararg, given.kwarg) if extra]
    if promise.is_method and "staticmethod" not in _decorators(promise.node):
        names = names[1:]
    return [name for name in names if not name.startswith("_")]


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(line.annotation)
    ]


def _own_statements(node: ast.FunctionDef) -> list[ast.AST]:
    """The statements of a function, without those of functions inside it."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        statement = waiting.pop()
        found.append(statement)
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(statement))
    return found


@every_promise
def test_docstring_says_what_it_is(promise):
    assert promise.summary.endswith((".", ":")), f"{promise.where}: no first line"
    assert not promise.summary.startswith(("Computes", "Compute ", "Returns", "Return ")), (
        f"{promise.where}: the first line says what it is"
    )
    for name, text in promise.sections.items():
        assert text.strip(), f"{promise.where}: {name} is empty"


@every_promise
def test_docstring_has_the_sections_its_signature_calls_for(promise):
    node, sections, where = promise.node, promise.sections, promise.where
    if isinstance(node, ast.ClassDef):
        explained = _entries(sections.get("Attributes", "")) | _entries(sections.get("Args", ""))
        missing = set(_fields(node)) - explained
        assert not (missing and promise.is_api), f"{where}: Attributes lacks {sorted(missing)}"
        return
    if _decorators(node) & {"property", "cached_property", "setter"}:
        return
    parameters, explained = set(_parameters(promise)), _entries(sections.get("Args", ""))
    unknown = explained - parameters
    assert not unknown, f"{where}: Args explains {sorted(unknown)}, which it does not take"
    returns = ast.unparse(node.returns) if node.returns else ""
    if promise.is_api:
        assert returns, f"{where}: no return annotation"
        missing = parameters - explained
        assert not missing, f"{where}: Args lacks {sorted(missing)}"
        assert "Returns" in sections or _explains_itself(returns), f"{where}: no Returns"
        raises = any(isinstance(each, ast.Raise) for each in _own_statements(node))
        assert "Raises" in sections or not raises, f"{where}: raises, and no Raises says what"


def _explains_itself(returns: str) -> bool:
    """Whether a return annotation is None, or one class whose own docstring says what it is."""
    returns = returns.strip("'\"")
    silent = returns in ("None", "NoReturn", "Never", "str", "bool", "Self")
    is_class = re.fullmatch(r"(\w+\.)*[A-Z]\w*", returns) is not None
    return silent or (is_class and returns.split(".")[-1] not in ("Any", "Array", "ArrayLike"))


def test_docstring_lines_are_sections_where_they_look_like_one():
    wrong = re.compile(r"^(Arguments|Parameters|Return|Raise|Note|Guarantees|References?):")
    for path in MODULES.values():
        for name, _, docstring in _documented(path):
            bad = [line for line in docstring.splitlines() if wrong.match(line)]
            assert not bad, f"{path.relative_to(ROOT)} {name}: {bad}"


def test_guarantees_cite_notes_that_exist():
    homes = {(note.id, note.path.name) for note in NOTES}
    wrong = []
    for path in MODULES.values():
        for name, _, docstring in _documented(path):
            guarantee = _sections(docstring)[1].get("Guarantee")
            if guarantee is None:
                continue
            sentence = " ".join(guarantee.split())
            where = f"{path.relative_to(ROOT)} {name}: Guarantee: {sentence}"
            cited = re.findall(r"((?:[A-Z]+\d+[a-z]?(?:, | and )?)+) \((\w+\.md)\)", sentence)
            if not cited:
                wrong.append(f"{where}: write it as `S2 (sensitivity.md).`")
            for identifiers, file in cited:
                for identifier in _CITED.findall(identifiers):
                    if (identifier, file) not in homes:
                        wrong.append(f"{where}: {file} has no note {identifier}")
    assert not wrong, "\n".join(wrong)


def test_notes_have_unique_ids():
    counted = collections.Counter(note.id for note in NOTES)
    assert not [identifier for identifier, times in counted.items() if times > 1]


def test_notes_exist_for_every_proof_file():
    assert NOTES, "no proof note was found: dpfa_jax/**/*.md"
    for path in sorted(PACKAGE.rglob("*.md")):
        assert path.with_suffix(".py").exists(), f"{path.name} lies beside no module"
        assert pins.read_notes(path), f"{path.name} holds no note that can be read"
        lines = path.read_text().splitlines()
        outside = [
            line
            for line in lines
            if line.startswith(("proves:", "tested:"))
            and not any(line in note.text.splitlines() for note in pins.read_notes(path))
        ]
        assert not outside, f"{path.name}: {outside} belong to no note"


@every_note
def test_note_is_complete(note):
    assert not note.errors, f"{note.path} {note.id}: cannot read {note.errors}"
    assert note.pins, f"{note.path} {note.id}: no `proves:` line"
    assert note.tests, f"{note.path} {note.id}: no `tested:` line"
    for part in PARTS:
        assert re.search(rf"^\*\*{part}[.:]?\*\*", note.text, re.MULTILINE), (
            f"{note.path} {note.id}: no **{part}**"
        )


@every_note
def test_note_pins_the_current_code(note):
    defined = pins.definitions(note.source)
    for name, pinned in note.pins:
        assert name in defined, f"{note.path} {note.id}: {note.source.name} has no {name}"
        current = pins.digest(defined[name])
        assert pinned == current, (
            f"{name} changed: {note.path} {note.id} pins {pinned}, the code is {current}. Read the "
            "note again; if it still proves what the code does, write the new digest."
        )


@every_note
def test_note_pins_what_its_functions_use(note):
    pinned = {name for other in NOTES if other.path == note.path for name, _ in other.pins}
    for name, _ in note.pins:
        used = pins.needs(note.source, name)
        assert not used - pinned, (
            f"{note.path} {note.id}: {name} uses {sorted(used - pinned)}; a changed formula there "
            "would go unread. Add `proves:` lines (`python -m tests.pins` prints the digests)."
        )


@functools.cache
def _tests_of(path: pathlib.Path) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


@every_note
def test_note_names_tests_that_run(note):
    for file, name in note.tests:
        path = ROOT / file
        assert path.is_file(), f"{note.path} {note.id}: there is no {file}"
        assert name in _tests_of(path), f"{note.path} {note.id}: {file} has no {name}"


@every_note
def test_note_is_cited_by_what_it_proves(note):
    documented = {
        name: text
        for name, node, text in _documented(note.source)
        if isinstance(node, ast.FunctionDef)
    }
    for name, _ in note.pins:
        if name in documented and not name.split(".")[-1].startswith("_"):
            guarantee = _sections(documented[name])[1].get("Guarantee", "")
            assert note.id in _CITED.findall(guarantee), (
                f"{note.source.name}: the docstring of {name} lacks `Guarantee: {note.id} (...)`"
            )


@every_promise
def test_proved_numbers_say_which_way_they_err(promise):
    returns = getattr(promise.node, "returns", None)
    if "Guarantee" in promise.sections and returns and ast.unparse(returns) == "float":
        said = promise.sections.get("Returns", "").lower()
        assert re.search(r"equality|upper bound|lower bound|private side", said), (
            f"{promise.where}: Returns says neither equality nor upper bound"
        )


def test_no_test_is_switched_off():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Name):
                word = node.attr if isinstance(node, ast.Attribute) else node.id
                assert word not in ("skip", "skipif", "xfail", "importorskip", "mock", "Mock"), (
                    f"{path.relative_to(ROOT)}:{node.lineno}: {word}"
                )
            if isinstance(node, ast.ClassDef):
                assert not node.name.startswith("Test"), f"{path.name}: {node.name}"


_EXAMPLES = [
    (module, name, docstring, node)
    for module, path in MODULES.items()
    for name, node, docstring in _documented(path)
    if ">>>" in docstring
]


@pytest.mark.parametrize(
    ("module", "name", "docstring", "node"),
    _EXAMPLES,
    ids=[f"{module}.{name}" for module, name, _, _ in _EXAMPLES],
)
def test_docstring_example_gives_what_it_says(module, name, docstring, node):
    namespace = dict(vars(importlib.import_module(module)))
    line = getattr(node, "lineno", 1)
    example = doctest.DocTestParser().get_doctest(docstring, namespace, name, module, line)
    assert example.examples
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
