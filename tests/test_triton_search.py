"""Runs `triton_cases.py`, and compiles the kernels for a GPU that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.kernels.residual_search import SearchTables, available_impls, rvq_search

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="this build of PyTorch has no Triton"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "interpreter",
        pytest.param(
            "gpu", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
def test_cases(where: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if where == "interpreter":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_it_is_offered_where_it_runs() -> None:
    assert available_impls() == ("reference", "blocked", "numba")
    assert ("triton" in available_impls("cuda")) == torch.cuda.is_available()
    with pytest.raises(ValueError, match="'triton' is not available"):
        rvq_search(torch.zeros(1, 4), SearchTables(torch.zeros(1, 2, 4)), impl="triton")
    code = """
import sys, torch
from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_search
tables = SearchTables(torch.zeros(1, 2, 4))
rvq_decode(rvq_search(torch.zeros(1, 4), tables), tables.entries_KCd)
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"  # it costs those nothing who have no GPU


class _Recorded:
    """In place of a kernel: what it would be called with."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((self.kernel, arguments, options))


def _compiled(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The kernel for an H100, which need not be there, as a launch with these arguments would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[(place,)] = "constexpr", options[name]
        elif isinstance(arguments[place], torch.Tensor):
            pointer = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}
            signature[name], attributes[(place,)] = pointer[arguments[place].dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("form", "num_latents", "precision"),
    [
        ("plain", 1, "ieee"),
        ("plain", 100, "ieee"),
        ("plain", 100, "tf32x3"),
        ("plain", 20_000, "ieee"),
        ("plain", 20_000, "tf32x3"),
        ("factorised", 16, "ieee"),
        ("factorised", 20_000, "ieee"),
    ],
)
def test_the_search_compiles_for_an_h100(
    monkeypatch: pytest.MonkeyPatch, form: str, num_latents: int, precision: str
) -> None:
    from codec.kernels import triton_search

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    few_kernel = triton_search._few_kernel
    for name in ("_many_kernel", "_few_kernel"):
        monkeypatch.setattr(triton_search, name, _Recorded(getattr(triton_search, name), calls))
    if form == "plain":
        tables = SearchTables(torch.ones(2, 1024, 128))
    else:
        takes = [(8, torch.ones(1000, 16)), (16, torch.ones(1000, 8)), (24, torch.ones(1000, 0))]
        tables = SearchTables(torch.ones(3, 1000, 8), chains=range(3), takes=takes)
    triton_search.search(torch.zeros(num_latents, tables.num_dims), tables, tables.num_rows, precision=precision)
    has_few = form == "plain" and num_latents == 1
    assert [kernel is few_kernel for kernel, _, _ in calls] == ([True] * 3 if has_few else [False])
    compiled = _compiled(*calls[0])
    assert ".ftz" not in compiled.asm["ptx"]  # small numbers stay what they are
    assert ("tf32" in compiled.asm["ptx"]) == (precision == "tf32x3")  # never unasked
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.usefixtures("no_cache")
def test_sums_compile_for_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    from codec.kernels import triton_sums

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("_decode_kernel", "_sums_kernel"):
        monkeypatch.setattr(triton_sums, name, _Recorded(getattr(triton_sums, name), calls))
    codes = torch.zeros(100, 8, dtype=torch.int64)
    triton_sums.decode(codes, torch.ones(8, 1024, 128))
    triton_sums.sums_by_code(torch.ones(100, 128), codes[:, 0], 1024)
    assert len(calls) == 2
    for call in calls:
        assert "atom" not in _compiled(*call).asm["ptx"]


def test_the_benchmark_runs_in_the_interpreter(tmp_path: Path) -> None:
    sizes = ["--rows", "2", "10", "--num-quantizers", "2", "--codebook-size", "20", "--dim", "8", "--repetitions", "1"]
    command = [sys.executable, "-m", "tools.benchmark_gpu_search", "--device", "cpu", "--json", tmp_path / "out.json"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *sizes], cwd=HERE.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert "10 rows" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["rows"] for result in results] == [2, 10]
    ways = ["few", "many ieee 32", "many ieee 128", "many tf32x3 32", "many tf32x3 128"]
    for result in results:
        assert list(result["candidates"]) == ["products", "loop", *ways]
        assert all(values["ms"] > 0 for values in result["candidates"].values())
        assert all(result["candidates"][way]["same"] == 1 for way in ways)
