"""The sdist and the wheel: they hold all that is needed, and run by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gpumanager

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def own_files() -> set[str]:
    """All that belongs to the package, code and data."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gpumanager").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_version_comes_from_one_place(built: Path) -> None:
    names = sorted(path.name for path in built.iterdir())
    version = gpumanager.__version__
    assert names == [f"mgpumanager-{version}-py3-none-any.whl", f"mgpumanager-{version}.tar.gz"]


def test_nothing_of_the_package_is_left_out(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert own_files() <= set(wheel.namelist())
        assert not any(name.startswith(("tests/", "benchmarks/")) for name in wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert own_files() | {"wsgi.py", "config/consumers.yaml", "requirements.txt"} <= names


def test_the_wheel_runs_by_itself(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(next(built.glob("*.whl")))], check=True, timeout=60)

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import gpumanager; print(gpumanager.__file__)").strip()
    assert where == str(target / "gpumanager" / "__init__.py")
    assert gpumanager.__version__ in run("-m", "gpumanager", "--version")
    assert run("-m", "gpumanager", "check", str(ROOT / "config" / "consumers.yaml"))
    assert (target / "bin" / "gpumanager").exists()
