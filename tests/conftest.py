"""What tests share: recorded data where it is present, a small drawn world, and one Ray for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from xdist.scheduler.loadscope import LoadScopeScheduling

from rar import hardware

if TYPE_CHECKING:
    from rar.engine.session import Session
    from tests.run.lab import Lab

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # before ray is imported, as the commands do
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is: two processes of tests share the cores

# A busy machine is no fault of an example: none is timed, neither by itself nor by how long all took to draw.
hypothesis_settings.register_profile("rar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("rar")

DEFAULT_MARKS = "not long and not slow and not server"  # as in pyproject.toml
SHARE_RAY = tuple(f"tests/{folder}/" for folder in ("engine", "gateway", "jobs", "run", "sweep", "tune"))
ROOT = Path(__file__).resolve().parents[1]
real_native = hardware.native
SHARED_DATA = ROOT.parent / "shared" / "data"
SHARED_CASES = ROOT.parent / "shared" / "cases"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
needs_shared_cases = pytest.mark.skipif(not SHARED_CASES.exists(), reason="needs ../shared/cases")


def pytest_configure() -> None:
    """Tests compare with oracles to many digits, whatever processor they run on: `precision: auto` is fp32 in them."""
    pytest.MonkeyPatch().setattr(hardware, "native", lambda device="auto": "fp32")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole default suite runs in two processes; what is named, or measures, in this one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if whole and config.option.markexpr == DEFAULT_MARKS else 0


class Halves(LoadScopeScheduling):
    """The folders that share one Ray go to one process, in order; modules of the others to whoever is free."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(SHARE_RAY) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Halves:
    return Halves(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares Ray comes first, as it takes longest; the gateway's last of it: they end the Serve that others share, which
    takes twenty seconds to come up again."""
    items.sort(key=lambda item: (not item.nodeid.startswith(SHARE_RAY), "tests/gateway/" in item.nodeid))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn miniature world of seed 0: two support and one test photo a class, four scenes."""
    from rar.miniature.data import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 0, shots=2, tests=1, scenes=4)
    return folder


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch has as many in this process, whatever the machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Session]:
    """A local Ray as the commands start it."""
    from rar.engine import session

    with session.opened() as opened:
        yield opened


@pytest.fixture(scope="session")
def lab(world: Path, ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A memory of 120 novel classes, built once; tests do not change it."""
    from dataclasses import replace

    from rar.memory.store import open_store
    from rar.run import build
    from tests.run.lab import Lab

    store = tmp_path_factory.mktemp("store") / "memory.milvus"
    with open_store(str(store)) as address:
        lab = Lab(world, store, replace(ray_session, memory=address))
        built = build.build_memory(lab.session, lab.settings(), fresh=False)
        metrics = built.metrics
        assert built.failed.num_rows == 0 and built.rows == 360
        assert (metrics["classes"], metrics["entries.images"], metrics["entries.texts"]) == (120, 240, 120)
        yield lab
