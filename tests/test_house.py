"""How the code is laid out: who imports whom and when, how long functions and classes are. Only sources are read."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALGORITHM = ("mmditx", "sd3_impls", "dit_embedder", "other_impls")  # each could be copied into another project
SCRIPTS = ("sd3_infer", "sd3_sweep", "sd3_probe")
WITHOUT_TORCH = ("mistakes", "flags", "models", "settings", "command", "png")  # a typo and --help answer at once
LONGEST_FUNCTION, LONGEST_CLASS = 60, 250  # lines of code
# Packages that functions may import: torch takes a second to load, the others need not be installed.
IN_FUNCTIONS = (
    "torch", "safetensors.torch", "diffusers", "huggingface_hub", "matplotlib", "playwright", "ray", "scipy",
    "sentencepiece", "transformers", "yaml",
)  # fmt: skip
# What else functions import, by module.
LATE = {
    ("sd3.device", "resource"),  # not on Windows
    ("sd3.sweep.command", "sd3.sweep.run"),  # imports torch; a mistake in the grid answers before that
    ("sd3.command", "tqdm"),  # takes a third of the time of --help
    ("sd3.probe.command", "sd3.probe.calibration"),  # imports torch, as above
    ("sd3.probe.command", "sd3.probe.measuring"),
    ("sd3.effects", "sd3_impls"),  # imports torch, as the next
    ("sd3.methods", "sd3_impls"),
    ("sd3.headers", "safetensors"),  # need not be there for an answer that reads no weights
    ("sd3.residual", "mmditx"),  # imports torch, which flags and settings do without
}
WRITERS = ("clear", "pop", "popitem", "setdefault", "update", "putenv", "unsetenv")  # methods that set the environment


@dataclass(frozen=True)
class Import:
    """One imported module by its full name. `late`: in a function; `at_run`: below `if TYPE_CHECKING` it is not."""

    name: str
    line: int
    late: bool
    at_run: bool


@dataclass(frozen=True)
class Module:
    """A source file by the name that imports know it by."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, late=False, at_run=True))

    def _imports(self, node: ast.AST, late: bool, at_run: bool) -> Iterator[Import]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (Import(name, node.lineno, late, at_run) for name in self._names(node))
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from self._imports(child, late, at_run=False)
            for child in node.orelse:
                yield from self._imports(child, late, at_run)
        else:
            late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from self._imports(child, late, at_run)

    def _names(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        """Full names: of `from a import b` it is `a.b` where that is a module of this project, else `a`."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        inner = [f"{source}.{alias.name}" for alias in node.names]
        return list(dict.fromkeys(name if name in MODULES else source for name in inner))


def sources(*folders: str) -> dict[str, Path]:
    """Source files by module name: those of the root, and all below some folders."""
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: path for path, name in sorted(names.items())}


MODULES = sources("sd3", "demo")  # the project itself
EVERYTHING = sources("sd3", "demo", "tests", "benchmarks")
PROJECT = [Module(name, path) for name, path in MODULES.items()]
ALL = [Module(name, path) for name, path in EVERYTHING.items()]
IN_SD3 = [module for module in PROJECT if module.name.partition(".")[0] == "sd3"]


def place(module: Module, line: int) -> str:
    return f"{module.path.relative_to(ROOT)}:{line}"


def check_none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def is_in(name: str, *packages: str) -> bool:
    """Whether a module is one of some packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# ---- who imports whom ----------------------------------------------------------------------------


def circle(edges: dict[str, list[str]]) -> list[str]:
    """A way along edges that ends where it began, or [] where there is none."""
    finished: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in finished:
            return []
        for other in edges.get(name, ()):
            if around := walk(other, [*way, name]):
                return around
        finished.add(name)
        return []

    return next((around for name in edges if (around := walk(name, []))), [])


def test_the_search_for_circles():
    assert circle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert circle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


def test_imports_are_told_apart():
    module = Module("sd3.sweep.grid", Path("grid.py"))
    module.__dict__["text"] = (
        "import os, torch.nn\nfrom sd3 import flags\nfrom ..flags import Flags\nfrom . import plan\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\nelse:\n    import json\n"
        "class A:\n    import re\n    def f(self):\n        import yaml\n"
    )
    found = {i.name: (i.late, i.at_run) for i in module.imports}
    assert found == {
        "os": (False, True), "torch.nn": (False, True), "sd3.flags": (False, True), "sd3.sweep.plan": (False, True),
        "typing": (False, True), "ray": (False, False), "json": (False, True), "re": (False, True),
        "yaml": (True, True),
    }  # fmt: skip


def test_no_circle_of_imports():
    assert circle({m.name: [i.name for i in m.imports if i.at_run and not i.late] for m in PROJECT}) == []


def test_no_module_imports_itself():
    check_none([place(m, i.line) for m in ALL for i in m.imports if i.name == m.name])


def test_the_package_imports_neither_the_scripts_nor_the_training():
    others = (*SCRIPTS, "demo")
    check_none([f"{place(m, i.line)}: {i.name}" for m in IN_SD3 for i in m.imports if is_in(i.name, *others)])


@pytest.mark.parametrize("name", ALGORITHM)
def test_an_algorithm_file_imports_torch_tokenizers_and_its_like(name):
    module = Module(name, MODULES[name])
    allowed = (*ALGORITHM, "torch", "tokenizers", "sentencepiece", *sys.stdlib_module_names)
    check_none([f"{place(module, i.line)}: {i.name}" for i in module.imports if not is_in(i.name, *allowed)])


def test_what_answers_at_once_imports_no_torch():
    imports = {m.name: [i.name for i in m.imports if i.at_run and not i.late] for m in PROJECT}
    wrong = []
    for start in WITHOUT_TORCH:
        ways = [[f"sd3.{start}"]]
        assert ways[0][0] in imports
        seen = {ways[0][0]}
        while ways:
            way = ways.pop()
            for name in imports.get(way[-1], ()):
                if is_in(name, "torch", "safetensors.torch", "torchvision"):
                    wrong.append(" -> ".join([*way, name]))
                elif name in imports and name not in seen:
                    seen.add(name)
                    ways.append([*way, name])
    check_none(wrong)


def test_nothing_outside_the_tests_imports_from_them():
    tests = {"tests", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    others = [m for m in ALL if not is_in(m.name, "tests")]
    check_none([f"{place(m, i.line)}: {i.name}" for m in others for i in m.imports if is_in(i.name, *tests)])


def test_tests_import_nothing_from_the_benchmarks():
    """But the converter to diffusers' layout, which both need."""
    benchmarks = {"benchmarks", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))} - {"to_diffusers"}
    tests = [m for m in ALL if is_in(m.name, "tests")]
    check_none([f"{place(m, i.line)}: {i.name}" for m in tests for i in m.imports if is_in(i.name, *benchmarks)])


def calls(module: Module, *names: str) -> list[ast.Call]:
    """The calls of functions or methods of some names."""
    found = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    return [call for call in found if getattr(call.func, "attr", getattr(call.func, "id", "")) in names]


def test_one_loop_makes_and_saves():
    """What saves a picture is handed to `make_pictures`, and no loop calls it."""
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    places = {}
    for module in PROJECT:
        for call in calls(module, "save_picture", "encode_picture"):
            around = [n for n in ast.walk(module.tree) if isinstance(n, loops) and call in ast.walk(n)]
            assert not around, place(module, call.lineno)
            places.setdefault(module.name, []).append(call)
    assert set(places) == {"sd3.png", "sd3.record", "sd3.sweep.work", "sd3.api"}
    assert {m.name for m in PROJECT if calls(m, "make_pictures")} == {"sd3.run", "sd3.serve", *places} - {
        "sd3.png",
        "sd3.record",
    }


# ---- when ----------------------------------------------------------------------------------------


def test_functions_import_only_what_is_slow_or_optional():
    late = [(m, i) for m in PROJECT for i in m.imports if i.late and i.at_run and not is_in(i.name, *IN_FUNCTIONS)]
    check_none([f"{place(m, i.line)}: {i.name}" for m, i in late if (m.name, i.name) not in LATE])
    assert LATE - {(m.name, i.name) for m, i in late} == set()


def test_every_import_stands_above_the_code():
    words = "noqa: " + "E402"  # not in one piece: this file is looked through too
    check_none([place(m, n) for m in ALL for n, line in enumerate(m.text.splitlines(), 1) if words in line])


def sets_environment(node: ast.AST) -> bool:
    """Whether a statement or call writes to `os.environ`."""
    environment = ("os.environ", "environ")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS:
        return ast.unparse(node.func.value) in (*environment, "os")
    targets = getattr(node, "targets", [getattr(node, "target", None)])  # of assignments and `del`
    parts = [t.value if isinstance(t, ast.Subscript) else t for t in targets if t is not None]
    written = isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete))
    return written and any(ast.unparse(part) in environment for part in parts)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when a module is imported: neither functions nor what only a program does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'":
            continue
        yield child
        yield from at_import(child)


def test_writing_to_the_environment_is_seen():
    wrong = (
        "os.environ['A'] = 'b'", "os.environ |= {}", "environ.setdefault('A', 'b')", "os.environ.update(a=1)",
        "os.putenv('A', 'b')", "del os.environ['A']", "if a:\n    os.environ.pop('A')",
    )  # fmt: skip
    right = (
        "a = os.environ | {}", "a = os.environ['A']", "os.environ.get('A')", "def f():\n    os.environ['A'] = 'b'",
        "a.update(b=os.environ)", "if __name__ == '__main__':\n    os.environ['A'] = 'b'",
    )  # fmt: skip
    assert [code for code in wrong if not any(map(sets_environment, at_import(ast.parse(code))))] == []
    assert [code for code in right if any(map(sets_environment, at_import(ast.parse(code))))] == []


def test_importing_sets_nothing_in_the_environment():
    check_none([place(m, node.lineno) for m in PROJECT for node in at_import(m.tree) if sets_environment(node)])


# ---- how long ------------------------------------------------------------------------------------


NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(text: str) -> set[int]:
    """The numbers of the lines that are not blank, comment or docstring. benchmarks/count.py counts the same."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                code.difference_update(range(first.lineno, first.end_lineno + 1))
    return code


def test_lines_are_counted():
    text = '''"""A module."""
import os  # one

# a comment
A = """a text

of three lines"""


def f(
    a,
):
    """Says

    what it does."""
    # why
    return a  # four
'''
    assert sorted(lines_of_code(text)) == [2, 5, 6, 7, 10, 11, 12, 17]


def too_long(kinds: tuple[type, ...], most: int) -> list[str]:
    """Definitions with more lines of code, decorators left out."""
    out = []
    for module in PROJECT:
        code = lines_of_code(module.text)
        for node in ast.walk(module.tree):
            if isinstance(node, kinds):
                length = len(code.intersection(range(node.lineno, node.end_lineno + 1)))
                if length > most:
                    out.append(f"{place(module, node.lineno)}: {node.name} has {length} lines")
    return out


def test_no_function_is_long():
    check_none(too_long((ast.FunctionDef, ast.AsyncFunctionDef), LONGEST_FUNCTION))


def test_no_class_is_long_but_the_engine():
    check_none(too_long((ast.ClassDef,), LONGEST_CLASS))
