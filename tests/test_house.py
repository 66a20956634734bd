"""The project's own files: who is to be cited, which versions are tested, how long a function may be, that everything
is used, and that docs/ARCHITECTURE.md knows every folder and names none that is gone."""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("cats", "kernels", "experiments", "reports")
LONGEST = 60
"""Lines of a function without its docstring. Kernels are exempt: what runs as one is written as one."""


TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".typ", ".css")


def test_the_citation_is_of_this_version_and_names_each_author_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    authors = [tuple(author.items()) for author in citation["preferred-citation"]["authors"]]
    assert len(authors) == len(set(authors)) == 5
    assert f"\n## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_python_of_the_project_is_tested() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = jobs["cpu"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.11", "3.12", "3.13"], "session": ["lint", "tests", "kernels", "bench"]}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines, from ``def`` on, without the docstring."""
    first = function.body[0]
    docstring = ast.get_docstring(function) is not None
    described = (first.end_lineno or first.lineno) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - described


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether numba or Triton compiles it."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_too_long(package: str) -> None:
    long = [
        f"{path.relative_to(ROOT)}: {function.name}, {lines_of(function)} lines"
        for path in sorted((ROOT / package).rglob("*.py"))
        for function in functions(path)
        if lines_of(function) > LONGEST and not is_kernel(function)
    ]
    assert long == []


def words(paths: list[Path]) -> Counter[str]:
    """How often each word stands in these files."""
    return Counter(word for path in paths for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))


def test_every_name_of_a_module_is_used() -> None:
    paths = [path for folder in (*PACKAGES, "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    counts = words([*paths, ROOT / "noxfile.py"])
    names = [name for path in paths if path.parent.name != "tests" for name in names_of(path)]
    assert [name for name in names if counts[name] < 2 and not name.startswith("__")] == []


def names_of(path: Path) -> Iterator[str]:
    """Functions, classes and constants of a module; without what a decorator hands to somebody who calls it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def files_of(folder: str) -> list[Path]:
    """Its files at any depth, without what Python, numba and pip leave there."""
    left = re.compile(r"__pycache__|.*\.egg-info")
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in paths if not any(left.fullmatch(part) for part in path.relative_to(ROOT).parts)]


def test_every_file_is_used() -> None:
    """Named in another file, or found by the pattern of its name."""
    discovered = re.compile(r"__(init|main)__|conftest|test_\w+|bench_\w+|from_\w+|e\d\d\w*")
    files = [path for folder in (*PACKAGES, "tests", "examples", "docs") for path in files_of(folder)]
    text = [path for path in [*files, *ROOT.glob("*.*"), *ROOT.glob("results/*.md")] if path.suffix in TEXT]
    mentions: dict[str, set[Path]] = {}
    for path in text:
        for word in set(re.findall(r"\w+", path.read_text(encoding="utf-8"))):
            mentions.setdefault(word, set()).add(path)
    unused = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if not discovered.fullmatch(path.stem)
        and path.parent != ROOT / "cats" / "criteria"
        and not any(name != path for name in mentions.get(path.stem, ()))
    ]
    assert unused == []


def folders() -> set[str]:
    """Every folder of the packages that holds a file, as docs/ARCHITECTURE.md writes it; ``eNN`` there means many."""
    parents = {path.relative_to(ROOT).parent for package in PACKAGES for path in files_of(package)}
    return {f"{folder.as_posix()}/" for folder in parents if not re.match(r"e\d\d", folder.name)}


def named_in(page: str) -> set[str]:
    """What a page calls a folder (``cats/models/``) or a module (``patching.py``), in backticks or in its diagram."""
    return set(re.findall(r"(?<![\w*/.])(?:\w+/)+(?![\w*])|(?<![\w*/])(?:\w+/)*\w+\.py\b", page))


def test_the_architecture_names_every_folder_and_nothing_else() -> None:
    named = named_in((ROOT / "docs" / "ARCHITECTURE.md").read_text())
    assert folders() <= named
    everything = [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.rglob("*.py") if ".nox" not in path.parts]
    modules = [name for name in named if name.endswith(".py")]
    assert len(modules) > 15
    assert [name for name in modules if not any(path.endswith(f"/{name}") for path in everything)] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("`cats/models/` and `patching.py`", {"cats/models/", "patching.py"}),
        ('C["experiments/cli.py, framework/profiles.py<br>a run"]', {"experiments/cli.py", "framework/profiles.py"}),
        ("`experiments/eNN_*.py`, `from_*.py`, `results/*.csv`", set()),
    ],
)
def test_names_are_found_on_a_page(page: str, names: set[str]) -> None:
    assert named_in(page) == names
