"""The examples in docstrings run, and the README speaks of things that exist."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shutil
from pathlib import Path

import pytest

import codec

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(codec.__path__, "codec."))
if importlib.util.find_spec("triton") is None:  # builds of PyTorch for the CPU alone have none
    MODULES = [module for module in MODULES if "triton" not in module]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_some_examples_were_found() -> None:
    finder = doctest.DocTestFinder()
    found = [test.name for module in MODULES for test in finder.find(importlib.import_module(module)) if test.examples]
    for name in ("Tokens", "StreamingEncoder", "StreamingDecoder", "ResidualVQ"):
        assert any(example.endswith(name) for example in found), name


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"python3? -m (recipes|tools)\.([\w.]*\w)", text):
        assert (ROOT / module[0] / f"{module[1].replace('.', '/')}.py").exists(), module


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    shutil.copy(ROOT / "tests" / "data" / "speech.flac", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
