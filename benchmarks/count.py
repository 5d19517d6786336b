"""Counts lines of code per file, without blank lines, comments and docstrings, and lists the longest functions and
classes.

    python benchmarks/count.py [--at COMMIT]

--at adds a column for a commit (read with `git archive`) before that of this checkout.
"""

from __future__ import annotations

import argparse
import ast
import io
import shutil
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASIDE = ("tests", "benchmarks")  # counted separately: not part of the project itself
NOT_OURS = ("build", "venv")  # skipped, as hidden folders are: files of pip and other tools
LONGEST = 5  # number of functions and of classes to list
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Count:
    """Lines of code of a checkout: by file, and by `file:line name` for the project's functions and classes."""

    files: dict[str, int]
    functions: dict[str, int]
    classes: dict[str, int]

    @classmethod
    def of(cls, root: Path) -> Count:
        """Counts the Python files below a folder."""
        count = cls({}, {}, {})
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not any(part.startswith(".") or part in NOT_OURS for part in name.parent.parts):
                count._add(name.as_posix(), path.read_text(encoding="utf-8"))
        return count

    def _add(self, name: str, text: str) -> None:
        tree = ast.parse(text)
        code = lines_of_code(text, tree)
        self.files[name] = len(code)
        if name.partition("/")[0] in ASIDE:
            return
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                kind = self.classes if isinstance(node, ast.ClassDef) else self.functions
                length = len(code.intersection(range(node.lineno, node.end_lineno + 1)))
                kind[f"{name}:{node.lineno} {node.name}"] = length

    def total(self, folder: str = "") -> int:
        """Lines of code in a folder, or in the whole project."""
        if folder:
            return sum(lines for name, lines in self.files.items() if name.startswith(f"{folder}/"))
        return sum(self.files.values()) - sum(map(self.total, ASIDE))

    @property
    def in_root(self) -> int:
        """Number of modules in the root folder."""
        return sum("/" not in name for name in self.files)


def lines_of_code(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that are not blank, comment or docstring. tests/test_house.py counts in the same way."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        if documented and ast.get_docstring(node, clean=False) is not None:
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


def count_at(commit: str) -> Count:
    """Counts the files of a commit. Exits if git does not have it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "commit.zip"
        made = subprocess.run(["git", "archive", "-o", archive, commit], cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"error: --at {commit}: {made.stderr.strip()}")
        shutil.unpack_archive(archive, Path(folder) / "files")
        return Count.of(Path(folder) / "files")


def main(at: str | None = None) -> None:
    """Prints a row per file, the sums, the number of modules in the root, and the longest functions and classes."""
    counts = {"lines": Count.of(ROOT)} if at is None else {at: count_at(at), "now": Count.of(ROOT)}
    columns = list(counts.values())
    print(f"| file | {' | '.join(counts)} |\n| --- |{' ---: |' * len(counts)}")

    def row(name: str, values: list[int | str]) -> None:
        print(f"| {name} | {' | '.join(f'{v:,}' if isinstance(v, int) else v for v in values)} |")

    names = {name for count in columns for name in count.files if name.partition("/")[0] not in ASIDE}
    for name in sorted(names, key=lambda n: (n.count("/") > 0, n)):
        row(name, [count.files.get(name, "") for count in columns])
    row("all of these", [count.total() for count in columns])
    for folder in ASIDE:
        row(f"{folder}/", [count.total(folder) for count in columns])
    row("modules in the root", [count.in_root for count in columns])
    for when, count in counts.items():
        for kind, lengths in (("functions", count.functions), ("classes", count.classes)):
            print(f"\nlongest {kind}{f', {when}' if at is not None else ''}")
            for name in sorted(lengths, key=lengths.get, reverse=True)[:LONGEST]:
                print(f"  {lengths[name]:5} {name}")


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--at", metavar="COMMIT", help="shown before what is here now")
    main(flags.parse_args().at)
