"""Many trainings on a bare host: in order, several at a time, stopped and continued."""
import json
import os
import subprocess
import sys

import pytest

from scaleprotoseg.recipes import RECIPES, experiments
from scaleprotoseg.schedule import Training, trainings

ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}


def train(out, *options):
    command = [sys.executable, '-m', 'scaleprotoseg', 'train', 'smoke', '--method', 'protoseg', '--out', str(out), '--device', 'cpu', *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENV)


@pytest.mark.parametrize('experiment', experiments())
def test_every_training_comes_once_and_after_what_it_waits_for(experiment):
    names = [t.name for t in trainings(experiment)]
    assert sorted(names) == sorted(f'{r.name} seed {s}' for r in RECIPES.values() if r.experiment == experiment for s in r.seeds)
    for i, t in enumerate(trainings(experiment)): assert not t.waits_for & set(names[i:]), t.name


def test_seeds_and_methods_are_chosen_with_what_they_start_from():
    found = trainings('demo-full', ['scaleprotoseg-veto'], [7])
    assert [t.name for t in found] == [f'demo-full/{m} seed 7' for m in ('pretrain', 'scaleprotoseg', 'scaleprotoseg-veto')]
    assert found[-1].arguments() == ['demo-full', 'scaleprotoseg', '--variant', 'veto', '--seed', '7']
    with pytest.raises(KeyError, match="did you mean 'protoseg'"): trainings('demo', ['protosed'])
    assert Training(RECIPES['em/protoseg-split2'], 0).waits_for == {'em/protoseg seed 0'}


def test_out_of_time_then_the_same_command_finishes(tmp_path):
    stopped = train(tmp_path, '--max-minutes', '0.05')
    assert stopped.returncode == 3 and 'out of time with 2 of 2 trainings to go; the same command continues' in stopped.stderr
    again = train(tmp_path, '--jobs', '2')
    assert again.returncode == 0, again.stderr
    finished = {p.parent.name for p in tmp_path.glob('smoke/protoseg/seed0/*/metrics.json')}
    assert finished == {s.name for s in RECIPES['smoke/protoseg'].stages}
    assert 'mIoU' in (tmp_path / 'smoke/protoseg/seed0/train.log').read_text()
    made = json.loads((tmp_path / 'smoke/protoseg/seed0/joint/provenance.json').read_text())
    assert made['command'] == 'scaleprotoseg run smoke protoseg --stage joint --seed 0'


def test_a_failed_training_is_named_with_its_exit_code(tmp_path):
    (tmp_path / 'smoke').write_text('in the way')
    done = train(tmp_path)
    assert done.returncode == 2 and 'smoke/pretrain seed 0: exit code 2; smoke/protoseg seed 0: not started' in done.stderr
    done = train(tmp_path, '--jobs', '0')
    assert done.returncode == 2 and 'jobs=0: expected how many trainings' in done.stderr
