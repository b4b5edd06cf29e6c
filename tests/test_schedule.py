"""Many trainings on a bare host: in order, several at a time, stopped and continued."""
import json
import os
import subprocess
import sys

import pytest

from scaleprotoseg.basics import Interrupted
from scaleprotoseg.recipes import RECIPES, experiments
from scaleprotoseg.schedule import Training, TrainingsFailed, run_trainings, trainings

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
    assert Training(RECIPES['em/protoseg-split2'], 0).before == []                                    # another division shares no stage with the first
    assert Training(RECIPES['demo/prototype_view-k1'], 0).waits_for == {'demo/pretrain seed 0'}
    assert Training(RECIPES['demo/scaleprotoseg-tau'], 0).waits_for == {'demo/pretrain seed 0', 'demo/scaleprotoseg seed 0'}


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


def pretended(seconds, code):
    "A process that is told what to do: it ends with `code` after so long, and with 3 when it is asked to stop."
    said = f'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(3)); print("why", flush=True); time.sleep({seconds}); sys.exit({code})'
    return [sys.executable, '-c', said]


def test_what_waits_for_a_stopped_training_is_stopped_too_and_not_failed(tmp_path):
    todo = trainings('smoke', ['protoseg'], [0, 1])
    early = lambda t: pretended(0, 3) if t.name == 'smoke/pretrain seed 0' else pretended(60, 0)
    with pytest.raises(Interrupted, match='out of time with 4 of 4 trainings to go; the same command continues'):
        run_trainings(todo, early, lambda t: tmp_path / f'{t.seed}.log', jobs=2, max_minutes=.05)
    failing = lambda t: pretended(0, 2 if t.name == 'smoke/pretrain seed 0' else 0)
    with pytest.raises(TrainingsFailed, match=r'2 of 4 .*smoke/pretrain seed 0: exit code 2, .*0\.log ends with "why"; smoke/protoseg seed 0: not started'):
        run_trainings(todo, failing, lambda t: tmp_path / f'{t.seed}.log', jobs=2)


def test_a_seed_that_is_said_twice_is_trained_once():
    assert len(trainings('smoke', ['protoseg'], [3, 3])) == 2
