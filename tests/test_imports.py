"""Who may import whom, what `import codec` costs, and what it offers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import codec

ROOT = Path(__file__).resolve().parent.parent
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "kernels": set(),
    "tokens": set(),
    "token_order": set(),
    "token_vocabulary": {"token_order", "tokens"},
    "files": set(),
    "stretch": set(),
    "entropy": set(),
    "wav": set(),
    "audio": {"files", "wav"},
    "header": set(),
    "speech_input": set(),
    "features": {"speech_input"},
    "bitstream": {"entropy", "files", "header"},
    "salvage": {"bitstream", "entropy", "header"},
    "token_format": {"bitstream", "entropy", "files", "salvage"},
    "layers": {"kernels"},
    "quantizers": {"config", "kernels", "layers"},
    "models": {"config", "features", "layers", "quantizers", "token_format", "tokens"},
    "streaming": {"layers", "models", "tokens"},
    "importers": {"config", "files", "layers", "models", "quantizers", "tokens"},
    "pretrained": {"config", "models", "quantizers", "token_format"},
    "windows": {"models"},
    "transcode": {"audio", "bitstream", "models", "streaming", "stretch", "token_format", "windows"},
    "batch": {"files"},
}
ATOP = {
    "__main__",
    "cli",
    "console",
    "evaluation",
    "jobs",
    "reports",
    "serving",
    "testing",
    "units",
    "units_cli",
    "verification",
}  # may import all of the library
HEAVY = [
    *("torch", "pytorch_lightning", "hydra", "librosa", "transformers", "torchaudio", "triton", "numpy", "soundfile"),
    *("fastapi", "uvicorn", "websockets", "prometheus_client"),
]


def _imports(file: Path) -> set[str]:
    """Modules of this project that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in {"codec", "recipes", "tools", "tests"}}


def _parts(names: set[str]) -> set[str]:
    """Of these modules, the parts of the library that they belong to."""
    parts = {name.split(".")[1] for name in names if name.startswith("codec.")}
    return parts & (set(ALLOWED) | ATOP)


def test_the_table_names_every_part() -> None:
    parts = {
        path.stem for path in (ROOT / "codec").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(ALLOWED) | ATOP


@pytest.mark.parametrize("part", [*ALLOWED, *sorted(ATOP)])
def test_parts_import_only_what_lies_below_them(part: str) -> None:
    home = ROOT / "codec" / part
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    for file in files:
        names = _imports(file)
        assert not {name for name in names if name.split(".")[0] != "codec"}, f"{file} imports from outside the library"
        assert part in ATOP or _parts(names) <= ALLOWED[part] | {part}, file


def test_recipes_import_no_tools() -> None:
    for file in (ROOT / "recipes").rglob("*.py"):
        assert not {name for name in _imports(file) if name.split(".")[0] in {"tools", "tests"}}, file


def test_importing_codec_loads_nothing_heavy() -> None:
    for module in ("codec", "codec.__main__", "codec.cli"):
        code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


def test_public_names_are_sorted_and_there() -> None:
    assert codec.__all__ == sorted(codec.__all__)
    assert dir(codec) == codec.__all__
    for name in codec.__all__:
        assert getattr(codec, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = codec.nothing


def test_files_stay_small() -> None:
    for folder in ("codec", "recipes", "tools", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 800, file
