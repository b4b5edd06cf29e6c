"""Training, use and paper notebooks on a device other than the CPU, which this machine need not have: see `elsewhere`."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

from scaleprotoseg.contents import paper_notebooks

ROOT = Path(__file__).parents[1]
SOME = ('scaleprotoseg/table_03', 'scaleprotoseg/table_09', 'scaleprotoseg/figure_02', 'scaleprotoseg/figure_04', 'scaleprotoseg/failure_cases',
        'prototype_view/figure_01')
OTHERS = [name for paper, notebook in paper_notebooks('smoke') if (name := f'{paper}/{notebook}') not in SOME]
pytestmark = pytest.mark.skipif(not hasattr(registration, '_setup_privateuseone_for_python_backend'), reason='needs a torch with devices written in Python')


def run(runs, work, notebooks):
    work.mkdir(parents=True)
    done = subprocess.run([sys.executable, Path(__file__).with_name('elsewhere.py'), runs, work, *notebooks], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('elsewhere')


@pytest.fixture(scope='module')
def found(runs): return run(runs, runs / 'work', SOME)


def test_tensors_of_two_devices_do_not_meet(found):
    assert len(found['refused']) == 8 and all(found['refused'].values()), found['refused']


@pytest.mark.parametrize('method', ['pretrain', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view'])
def test_training_gives_the_same_numbers_as_here(method, found):
    assert found['elsewhere'][method] == found['here'][method]


def test_every_recipe_trains(found):
    assert all(stages for stages in found['elsewhere'].values()) and {'deeplabv2', 'scaleprotoseg-veto'} <= found['elsewhere'].keys()


def test_stopped_training_continues(found):
    assert found['sessions'] == 5 and found['continued'] == found['elsewhere']['prototype_view']['joint']


def test_finished_stage_predicts_explains_evaluates_and_exports(found):
    assert not found['use'], found['use']


@pytest.mark.parametrize('notebook', SOME)
def test_notebook(notebook, found):
    assert not found['notebooks'][notebook], found['notebooks'][notebook]


@pytest.mark.slow
def test_all_other_notebooks(found, runs):
    failed = {name: why for name, why in run(runs, runs / 'others', OTHERS)['notebooks'].items() if why}
    assert not failed, failed
