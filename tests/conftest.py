"""What every test runs under: fixed threads, no network, NaN in uninitialised memory, a fixed seed."""

import os

# Read when torch and the Hub client are imported, hence before them. PASSIVE: spinning threads starve a second process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides when a kernel is defined whether it runs on the CPU. Tests that compile kernels run in a new process.
os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """One thread per worker: workers of pytest-xdist share the cores."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdigit() else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan"))

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty*` gives NaN, so that a result read from memory that was never written is red, not lucky."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock `FluxPipeline` with random weights, saved as users have it; one token is 4x4 pixels."""
    from vision_attn.shapes.model import build_pipeline, default_settings, save_pipeline

    pipe = build_pipeline(seed=3)
    generator = torch.Generator().manual_seed(3)
    for parameter in pipe.transformer.parameters():
        # Untrained weights of this model are zero where it matters: no attention would ever reach the picture.
        torch.nn.init.normal_(parameter, std=0.06, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    save_pipeline(pipe, folder, default_settings())
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, standard output, standard error."""

    from vision_attn import cli

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run
