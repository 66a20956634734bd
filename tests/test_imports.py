"""What can be imported, and what the wheel holds: `kernels/` must never be Python's `kernels`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def test_the_package_kernels_of_hugging_face_is_not_shadowed(tmp_path: Path) -> None:
    """transformers imports `kernels` where it is installed; here a package of that name notes who took what from it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "ORIGIN = 'hub'\nclass Anything:\n    def __init__(self, *a, **k): pass\n"
        "def __getattr__(name):\n    if name[:2] == '__':\n        raise AttributeError(name)\n    return Anything\n"
    )
    metadata = tmp_path / "kernels-0.12.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.0\n")
    code = f"""
import sys
sys.path.append({str(tmp_path)!r})  # after the repository root, as site-packages is
import kernels
import transformers, cats, cats_kernels
assert kernels.ORIGIN == "hub", kernels
transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM
assert sys.modules["kernels"] is kernels
print(cats.__file__, cats_kernels.__file__, sep="\\n")
"""
    done = run(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        str(ROOT / "cats" / "__init__.py"),
        str(ROOT / "kernels" / "cats_kernels" / "__init__.py"),
    ]


def test_the_folder_kernels_has_no_module_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is not None and s.origin)"
    # without the package of that name: at most a namespace with no file, which any real package takes precedence over
    if importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin is None:
        assert run(code, cwd=ROOT).stdout.strip() in ("None", "False")


def test_reports_need_neither_torch_nor_the_kernels() -> None:
    code = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "cats_kernels", "triton", "numba"):
    sys.modules[name] = None
import reports
for module in pkgutil.walk_packages(reports.__path__, "reports."):
    importlib.import_module(module.name)
"""
    done = run(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy of the tracked parts that it needs."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cats", "kernels", "experiments", "reports", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import setuptools.build_meta as b; b.build_wheel({str(target)!r})"
    done = run(code, cwd=source)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_two_packages(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"cats", "cats_kernels"}
    for folder in (ROOT / "cats", ROOT / "kernels" / "cats_kernels"):
        modules = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}
        assert modules and modules <= set(names)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"cats/pocket_model/{file}" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


EXTRAS = ("accelerate", "datasets", "gguf", "lm_eval", "matplotlib", "pandas", "peft", "psutil", "scipy", "typst")
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path = [sys.argv[1]] + [path for path in sys.path if path]
for name in sys.argv[2:]:
    sys.modules[name] = None
import cats, cats_kernels
assert cats.__file__.startswith(sys.argv[1]) and cats_kernels.__file__.startswith(sys.argv[1])
for package in (cats, cats_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.rpartition(".")[2] == "__main__":
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(f"{module.name}: {error}")
"""


def test_an_installed_wheel_imports_or_says_which_extra_is_missing(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Without what only the extras bring, and without this source tree."""
    wheel.extractall(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path), *EXTRAS],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    names = (
        "evaluation", "finetuning", "generated_answers", "language_model", "lora", "perplexity", "quiet", "task_data",
        "task_index",
    )  # fmt: skip
    assert set(said) == {f"cats.{name}" for name in names}
    hint = "which is not installed: pip install 'cats-sparsity[experiments]' brings it"
    for sentence in said.values():
        assert re.fullmatch(rf"cats\.\w+ needs the package \w+, {re.escape(hint)}", sentence)


def test_the_wheel_brings_the_command_line(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "cats = cats.__main__:main" in wheel.read(entry_points).decode()
