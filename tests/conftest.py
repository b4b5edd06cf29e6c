"Fixtures that find golden vectors and real sample data; without them the tests that need them skip visibly."
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# One thread, here and in every process that a test starts: with several, sums may differ in the last bit from run to run.
os.environ['OMP_NUM_THREADS'] = '1'

SHARED = Path(__file__).resolve().parents[2] / 'shared'


def pytest_collection_modifyitems(items: list[pytest.Item]):
    "The file that takes longest comes first; where files run side by side, all others run beside it."
    items.sort(key=lambda item: item.path.name != 'test_workflow.py')


def _needs(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f'needs ../{path.relative_to(SHARED.parent)}')
    return path


@pytest.fixture(scope='session', autouse=True)
def _temporary_files() -> Iterator[None]:
    "What notebooks and commands leave in the temporary folder goes when the tests end."
    with tempfile.TemporaryDirectory(prefix='tests-') as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv('TMPDIR', folder)
        patch.setattr(tempfile, 'tempdir', folder)
        yield


@pytest.fixture(scope='session')
def shared() -> Path:
    "The folder of golden vectors and sample data beside the repository."
    return _needs(SHARED)


@pytest.fixture(scope='session')
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    "`golden('head')` loads the arrays of golden/head.npz."
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(_needs(SHARED / 'golden' / f'{name}.npz')) as f:
            return dict(f)
    return load
