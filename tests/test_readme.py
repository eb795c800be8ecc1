"""Which statement does this file keep true? README.md can be typed in; its numbers were measured.

A table of results is preceded by a comment that names the experiment and the commit whose JSON line
in experiments/results/ it shows:

    <!-- results: private_memory commit=0123abc -->
    | dataset | mechanism | epsilon | accuracy | standard_error |

Every column is then a field of the line's metrics and every row must be one of its records. With
`cells=accuracy columns=epsilon` the columns after the named ones are values of that field, and a
cell is the value, with `± standard error` where wanted:

    <!-- results: private_memory commit=0123abc cells=accuracy columns=epsilon -->
    | dataset | mechanism | ε = 0.5 | ε = 1 |
    | --- | --- | --- | --- |
    | digits | `GaussianProcessNoise` (S5) | .767 | .897 ± .014 |

A record whose `columns` field is null or infinite (no privacy) fits every column. Text beside a
name in backticks is free; "–" says that there is no such record. After the commit, `dataset=digits`
and the like narrow the records, and `repetitions=10`, a field of the run's config, narrows the
lines; the last one that fits is meant. Values must be those of the line, rounded to the digits
shown; one digit is no rounding, it must be exact.
"""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import typing

import pytest

from tests.pins import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"
LONGEST_EXAMPLE = 12

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^<!--\s*results:\s*(?P<experiment>\w+)(?P<settings>[^>]*?)\s*-->$")
_NUMBER = re.compile(r"^[-+−]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?$")
_LOOKS_MEASURED = re.compile(r"^[~≈]?\**(?:\d*\.\d+|\d+ ?%)\**(?: ?± ?\d*\.\d+)?$")


@dataclasses.dataclass(frozen=True)
class Table:
    """A Markdown table: its line number, the comment above it, its header and rows of cells."""

    line: int
    comment: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def read_tables(text: str) -> list[Table]:
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        is_first = line.startswith("|") and (number == 0 or not lines[number - 1].startswith("|"))
        if not is_first:
            continue
        end = number
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        above = next((each for each in reversed(lines[:number]) if each.strip()), "")
        rows = tuple(_cells(row) for row in lines[number + 2 : end])
        found.append(Table(number + 1, above.strip(), _cells(line), rows))
    return found


def _text(cell: str) -> str:
    """What a cell names: what stands in backticks, or the cell without emphasis."""
    code = re.search(r"`([^`]+)`", cell)
    return code[1] if code else cell.replace("*", "").strip()


def _agrees(shown: str, value: typing.Any) -> bool:
    """Whether a cell shows a value: equal text, or the number rounded to the digits shown."""
    shown = _text(shown).replace("−", "-")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shown == str(value) or (shown == "–" and value is None)
    if not _NUMBER.match(shown):
        return (shown, value) in (("∞", math.inf), ("inf", math.inf))
    if float(shown) == value:
        return True
    mantissa, _, exponent = shown.partition("e")
    digits = len(mantissa.lstrip("+-0.").replace(".", ""))
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return digits > 1 and abs(float(shown) - value) <= 0.5 * unit * (1 + 1e-9)


def _is(shown: str, value: typing.Any) -> bool:
    """Whether a column's title names exactly this value."""
    return (
        value is not None and float(shown) == value
        if _NUMBER.match(shown)
        else _agrees(shown, value)
    )


def _agrees_with_error(shown: str, record: dict[str, typing.Any], field: str) -> bool:
    value, _, error = _text(shown).partition("±")
    stated = not error or _agrees(error.strip(), record["standard_error"])
    return stated and _agrees(value.strip(), record[field])


def cited_line(comment: str, results: pathlib.Path) -> tuple[dict[str, typing.Any], dict[str, str]]:
    """The JSON line a results comment cites, and the comment's settings."""
    match = _COMMENT.match(comment)
    assert match, f"cannot read {comment}"
    settings = dict(setting.split("=", 1) for setting in match["settings"].split())
    commit = settings.pop("commit", "")
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit), f"{comment}: name a clean commit"
    path = results / f"{match['experiment']}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    clean = [line for line in lines if "-" not in line["commit"]]
    cited = [line for line in clean if line["commit"].startswith(commit[: len(line["commit"])])]
    for field in [name for name in settings if any(name in line["config"] for line in cited)]:
        wanted = settings.pop(field)
        cited = [line for line in cited if _is(wanted, line["config"].get(field))]
    assert cited, f"{path.name} has no line of commit {commit} and these settings"
    return cited[-1], settings


def _records(
    line: dict[str, typing.Any], filters: dict[str, str]
) -> tuple[dict[str, typing.Any], ...]:
    metrics = line["metrics"]
    records = metrics if isinstance(metrics, list) else [metrics]
    for field, wanted in filters.items():
        assert all(field in record for record in records), f"no metric is called {field}"
        records = [record for record in records if _agrees(wanted, record[field])]
    return tuple(records)


def _fits_all_columns(value: typing.Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def check_table(table: Table, results: pathlib.Path) -> None:
    """Fail unless every cell of a results table is what its JSON line says."""
    line, settings = cited_line(table.comment, results)
    cells, columns = settings.pop("cells", ""), settings.pop("columns", "")
    records = _records(line, settings)
    assert records and table.rows, f"README line {table.line}: an empty table"
    header = [_text(cell) for cell in table.header]
    named = [name for name in header if all(name in record for record in records)]
    if not columns:
        assert named == header, f"README line {table.line}: {set(header) - set(named)} is no metric"
    assert header[: len(named)] == named, f"README line {table.line}: named columns come first"
    for row in table.rows:
        where = f"README line {table.line}, row {row}"
        assert len(row) == len(header), f"{where}: {len(row)} cells under {len(header)} columns"
        labels = row[: len(named)]
        mine = [
            record
            for record in records
            if all(_agrees(cell, record[name]) for name, cell in zip(named, labels, strict=True))
        ]
        assert mine, f"{where}: {line['experiment']} at {line['commit']} says otherwise"
        for title, cell in zip(header[len(named) :], row[len(named) :], strict=True):
            at = title.rpartition("=")[2].strip()
            found = [r for r in mine if _fits_all_columns(r[columns]) or _is(at, r[columns])]
            if cell in ("–", ""):
                assert not found, f"{where}: {title} was measured, {found}"
                continue
            assert len(found) == 1, f"{where}: {len(found)} records for {title}"
            assert _agrees_with_error(cell, found[0], cells), (
                f"{where}: {title} shows {cell}, measured {found[0][cells]}"
            )


BLOCKS = [match for match in _FENCE.finditer(README) if match["language"] == "python"]
TABLES = [table for table in read_tables(README) if table.comment.startswith("<!-- results:")]


def test_readme_has_examples_and_results():
    assert len(BLOCKS) >= 2, "the README promises two examples"
    assert TABLES, "the README promises a table of results: `<!-- results: ... -->` above it"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line-{_line_of(block)}")
def test_readme_example_runs(block, tmp_path, monkeypatch):
    lines = block["body"].splitlines()
    assert len(lines) <= LONGEST_EXAMPLE, f"{len(lines)} lines"
    monkeypatch.chdir(tmp_path)
    code = "\n" * _line_of(block) + block["body"]
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def _line_of(block: re.Match[str]) -> int:
    return README[: block.start()].count("\n") + 1


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"line-{table.line}")
def test_readme_numbers_are_those_of_their_run(table):
    check_table(table, RESULTS)


def test_readme_shows_no_number_without_a_run():
    for table in read_tables(README):
        if not table.comment.startswith("<!-- results:"):
            loose = [cell for row in table.rows for cell in row if _LOOKS_MEASURED.match(cell)]
            assert not loose, f"line {table.line}: {loose}: say which run made them"


def test_readme_commits_are_in_the_history():
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        return
    for table in TABLES:
        line, _ = cited_line(table.comment, RESULTS)
        assert git("merge-base", "--is-ancestor", line["commit"], "HEAD").returncode == 0, (
            f"{line['commit']} is not in the history of HEAD"
        )


def test_readme_links_lead_somewhere():
    text = _FENCE.sub("", README)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    )
    for target in targets:
        if not re.match(r"https?:|mailto:|#", target):
            assert (ROOT / target.partition("#")[0]).exists(), f"README links to {target}"


def test_readme_commands_are_targets():
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z][\w-]*)`", _FENCE.sub("", README)))
    for block in _FENCE.finditer(README):
        if block["language"] in ("", "bash", "sh", "shell", "text"):
            named |= set(re.findall(r"^\$? ?make ([a-z][\w-]*)", block["body"], re.MULTILINE))
    assert {"demo", "test"} <= named, "the README promises `make demo` and `make test`"
    assert named <= targets, f"the Makefile has no {named - targets}"


_RUN = {
    "experiment": "toy",
    "config": {"repetitions": 10},
    "commit": "0123abc4567d",
    "metrics": [
        {"mechanism": "Gaussian", "epsilon": 0.5, "accuracy": 0.76691, "standard_error": 0.0199},
        {"mechanism": "Gaussian", "epsilon": 1.0, "accuracy": 0.89649, "standard_error": 0.0141},
        {"mechanism": "Gaussian", "epsilon": 2.0, "accuracy": 0.92777, "standard_error": 0.0121},
        {"mechanism": "NonPrivate", "epsilon": None, "accuracy": 0.942, "standard_error": 0.011},
    ],
}
_WIDE = """
<!-- results: toy commit=0123abc cells=accuracy columns=epsilon -->
| mechanism | ε = 1 | ε = 2 | ε = 4 |
| --- | --- | --- | --- |
| `Gaussian` (S5) | .896 ± .014 | **0.9278** | – |
| NonPrivate | .942 | .94 | .942 |
"""
_LONG = """
<!-- results: toy commit=0123abc4567d repetitions=10 mechanism=Gaussian -->

| epsilon | accuracy |
| --- | --- |
| .5 | .77 |
| 1 | .896 |
| 2 | .928 |
"""


_MISTAKES = [
    (_WIDE, ".896", ".897"),
    (_WIDE, ".014", ".015"),
    (_WIDE, "0.9278", "0.9277"),
    (_WIDE, "–", ".93"),
    (_WIDE, "| .942 |", "| – |"),
    (_WIDE, "| .94 |", "| about |"),
    (_WIDE, "ε = 2", "ε = 3"),
    (_WIDE, "Gaussian", "Laplace"),
    (_WIDE, "mechanism |", "accuracy |"),
    (_WIDE, "0123abc", "0123abd"),
    (_LONG, "| 2 |", "| 3 |"),
    (_LONG, ".928", ".927"),
    (_LONG, ".928", ".9"),
    (_LONG, "| 1 |", "| 1.1 |"),
    (_LONG, "| accuracy |", "| speed |"),
    (_LONG, "repetitions=10", "repetitions=2"),
    (_LONG, "mechanism=Gaussian", "mechanism=NonPrivate"),
]


def _write_run(folder: pathlib.Path) -> pathlib.Path:
    dirty = _RUN | {"commit": "0123abc4567d-dirty", "metrics": []}
    (folder / "toy.jsonl").write_text(f"{json.dumps(_RUN)}\n{json.dumps(dirty)}\n")
    return folder


@pytest.mark.parametrize("text", [_WIDE, _LONG], ids=["wide", "long"])
def test_check_table_accepts_what_was_measured(tmp_path, text):
    (table,) = read_tables(text)
    check_table(table, _write_run(tmp_path))


@pytest.mark.parametrize(("text", "shown", "wrong"), _MISTAKES)
def test_check_table_fails_where_one_thing_is_off(tmp_path, text, shown, wrong):
    assert shown in text
    (table,) = read_tables(text.replace(shown, wrong))
    with pytest.raises(AssertionError):
        check_table(table, _write_run(tmp_path))
