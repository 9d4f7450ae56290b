"""What all tests share: one thread, no cluster, and a scratch place away from the checkout."""

import os
from pathlib import Path

import pytest

# Sums in one thread are reproducible, and two cores are not fought over. Set before torch is loaded, so that tests
# without torch need not load it, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("USS_WORKERS", "0")
os.environ.pop("DASK_SCHEDULER_ADDRESS", None)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _scratch_away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks and resumable state go to $DVC_ROOT/data/scratch."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path_factory.getbasetemp() / "dvc-root"))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, which is $DVC_ROOT too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path
