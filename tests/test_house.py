"""The project's own files: who is to be cited, which versions are tested, and how long a function may be."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("cats", "kernels", "experiments", "reports")
LONGEST = 60
"""Lines of a function without its docstring. Kernels are exempt: what runs as one is written as one."""


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
