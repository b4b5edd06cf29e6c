"""Training, use and paper notebooks on a device other than the CPU, which this machine need not have: see `elsewhere`."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

from scaleprotoseg.contents import paper_notebooks
from scaleprotoseg.recipes import find_recipe, recipes_of

ROOT = Path(__file__).parents[1]
SOME = ('scaleprotoseg/table_03', 'scaleprotoseg/table_09', 'scaleprotoseg/figure_02', 'scaleprotoseg/figure_04', 'scaleprotoseg/failure_cases',
        'prototype_view/figure_01')
OTHERS = [name for paper, notebook in paper_notebooks('smoke') if (name := f'{paper}/{notebook}') not in SOME]
pytestmark = pytest.mark.skipif(not hasattr(registration, '_setup_privateuseone_for_python_backend'), reason='needs a torch with devices written in Python')


def run(what, runs, work, *notebooks):
    work.mkdir(parents=True)
    done = subprocess.run([sys.executable, Path(__file__).with_name('elsewhere.py'), what, runs, work, *notebooks], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('elsewhere')


@pytest.fixture(scope='module')
def found(runs): return run('train', runs, runs / 'work')


@pytest.fixture(scope='module')
def shown(found, runs): return run('notebooks', runs, runs / 'some', *SOME)


def test_tensors_of_two_devices_do_not_meet(found):
    assert {name for name, refused in found['refused'].items() if not refused} == set()
    assert {name: why for name, why in found['allowed'].items() if why} == {}


@pytest.mark.parametrize('method', ['pretrain', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view'])
def test_training_gives_the_same_numbers_as_here(method, found):
    assert found['elsewhere'][method] == found['here'][method]


def test_every_recipe_trained_there(found, runs):
    devices = {p.relative_to(runs): json.loads(p.read_text())['device'] for p in runs.glob('smoke/*/seed0/*/provenance.json')}
    assert len(devices) == sum(len(r.stages) for r in recipes_of('smoke')) == sum(len(stages) for stages in found['elsewhere'].values())
    assert {d.split(',')[0] for d in devices.values()} == {'elsewhere'}


def test_stopped_training_continues(found):
    assert found['sessions'] == find_recipe('smoke', 'prototype_view').stage('joint').train.steps
    assert found['continued'] == found['elsewhere']['prototype_view']['joint']


def test_finished_stage_predicts_explains_evaluates_and_exports(found):
    assert not found['use'], found['use']


@pytest.mark.parametrize('notebook', SOME)
def test_notebook(notebook, shown):
    failed, operators = shown[notebook]
    assert not failed, failed
    assert operators > 0


@pytest.mark.slow
def test_all_other_notebooks(found, runs):
    failed = {name: why for name, (why, _) in run('notebooks', runs, runs / 'others', *OTHERS).items() if why}
    assert not failed, failed


@pytest.mark.slow
def test_other_recipes_train(tmp_path):
    names = ('em/scaleprotoseg', 'em-ablations/scaleprotoseg-rescaled', 'pascal/scaleprotoseg', 'pascal-ablations/protoseg-legacy',
             'pascal-ablations/deeplabv2-sgd', 'cocostuff/prototype_view', 'cityscapes-hrnet/prototype_view-legacy', 'ade20k-segformer/prototype_view')
    failed = {name: why for name, why in run('miniatures', tmp_path / 'runs', tmp_path / 'work', *names).items() if why}
    assert not failed, failed
