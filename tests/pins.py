"""Proof notes and the code they pin; `python -m tests.pins [module ...]` prints the digests.

A note stands in `x.md` beside `x.py`:

    ## S2 Fixed-reference sums
    proves: attention_sums 0123456789ab
    tested: tests/test_sensitivity.py::test_attention_sums_is_reached

The digest is that of the function's syntax tree without docstrings, so a comment or a line break
may change and a formula may not. What a pinned function uses of its own module (a helper, a
constant) is part of the formula and is pinned too: one more `proves:` line in any note of the file.
"""

import ast
import copy
import dataclasses
import functools
import hashlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpfa_jax"

_HEADING = re.compile(r"^##\s+(?P<id>[A-Z]+\d+[a-z]?)\b[ .:]*(?P<title>.*)$")
_PROVES = re.compile(r"^proves:\s*`?(?P<name>[\w.]+)`?\s+`?(?P<digest>[0-9a-f]{12})`?\.?$")
_TESTED = re.compile(r"^(?P<path>tests/[\w./]+\.py)::(?P<name>test_\w+)$")


@dataclasses.dataclass(frozen=True)
class Note:
    """One section of a proof file.

    Attributes:
      path: the file, relative to the checkout.
      id: as docstrings cite it, for example "S2".
      text: the section's text.
      pins: (name, digest) of each `proves:` line.
      tests: (path, name) of each `tested:` entry.
      errors: lines that look like pins and cannot be read.
    """

    path: pathlib.Path
    id: str
    text: str
    pins: tuple[tuple[str, str], ...]
    tests: tuple[tuple[str, str], ...]
    errors: tuple[str, ...]

    @property
    def source(self) -> pathlib.Path:
        """The module the note is about."""
        return ROOT / self.path.with_suffix(".py")


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node


def digest(node: ast.AST) -> str:
    """The first 12 hex digits of SHA-256 over `ast.dump` of a definition without docstrings."""
    everything = {} if sys.version_info < (3, 13) else {"show_empty": True}
    dumped = ast.dump(_WithoutDocstrings().visit(copy.deepcopy(node)), **everything)
    return hashlib.sha256(dumped.encode()).hexdigest()[:12]


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


@functools.cache
def definitions(path: pathlib.Path) -> dict[str, ast.stmt]:
    """Every function, class, method (as `Class.method`) and constant a module defines."""
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(path.read_text()).body:
        for name in _names(statement):
            found[name] = statement
        if isinstance(statement, ast.ClassDef):
            for member in statement.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{statement.name}.{member.name}"] = member
    return found


def needs(path: pathlib.Path, name: str) -> set[str]:
    """The names of its own module whose values a definition uses, directly or through others."""
    defined = definitions(path)
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        statement = _WithoutAnnotations().visit(copy.deepcopy(defined[waiting.pop()]))
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in defined and node.id not in reached:
                reached.add(node.id)
                waiting.append(node.id)
    return reached - {name, name.split(".")[0]}


def _note(path: pathlib.Path, identifier: str, lines: list[str]) -> Note:
    pins, tests, errors = [], [], []
    for line in lines:
        if line.startswith("proves:"):
            match = _PROVES.match(line.strip())
            if match:
                pins.append((match["name"], match["digest"]))
            else:
                errors.append(line)
        elif line.startswith("tested:"):
            for entry in re.split(r"[,\s]+", line.removeprefix("tested:").strip()):
                match = _TESTED.match(entry.strip("`"))
                if match:
                    tests.append((match["path"], match["name"]))
                else:
                    errors.append(line)
    return Note(path, identifier, "\n".join(lines), tuple(pins), tuple(tests), tuple(errors))


def read_notes(path: pathlib.Path) -> list[Note]:
    """The notes of one file, in order."""
    relative = path.relative_to(ROOT)
    sections: list[tuple[str, list[str]]] = []
    for line in path.read_text().splitlines():
        heading = _HEADING.match(line)
        if heading:
            sections.append((heading["id"], []))
        elif line.startswith("## "):
            sections.append(("", []))
        elif sections:
            sections[-1][1].append(line)
    return [_note(relative, identifier, lines) for identifier, lines in sections if identifier]


def all_notes() -> list[Note]:
    """Every proof note of the package."""
    return [note for path in sorted(PACKAGE.rglob("*.md")) for note in read_notes(path)]


def _report(wanted: list[str]) -> int:
    stale = 0
    pinned: dict[tuple[pathlib.Path, str], list[tuple[str, str]]] = {}
    for note in all_notes():
        for name, value in note.pins:
            pinned.setdefault((note.source, name), []).append((note.id, value))
    for path in sorted(PACKAGE.rglob("*.py")):
        if not (path.with_suffix(".md").exists() or path.stem in wanted):
            continue
        if wanted and path.stem not in wanted:
            continue
        print(path.relative_to(ROOT))
        for name, statement in definitions(path).items():
            current = digest(statement)
            notes = pinned.pop((path, name), [])
            old = [f"{note} pins {value}: STALE" for note, value in notes if value != current]
            stale += len(old)
            said = "; ".join(old) or ", ".join(note for note, _ in notes) or "-"
            print(f"  {current}  {name}  {said}")
    for (path, name), notes in pinned.items():
        if not wanted or path.stem in wanted:
            stale += 1
            print(f"{path.relative_to(ROOT)} has no {name}, which {notes[0][0]} pins")
    return stale


if __name__ == "__main__":
    sys.exit(1 if _report(sys.argv[1:]) else 0)
