"""A run killed at any moment and run again ends with the numbers of an uninterrupted one."""
import csv
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from scaleprotoseg.model import read_tensors

# Runs two stages; the fault is injected from outside, the package knows nothing of it.
SCRIPT = '''
import os, signal, sys
from pathlib import Path
import scaleprotoseg.model as model, scaleprotoseg.training as training
fault, out = sys.argv[1], sys.argv[2]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def nth(n, f, before):
    count = [0]
    def g(*a, **k):
        count[0] += 1
        if count[0] == n and before: die()
        result = f(*a, **k)
        if count[0] == n: die()
        return result
    return g
training.SAVE_SECONDS = 0.                                    # a state after every step
if fault == 'in a step': training.stage_losses = nth(5, training.stage_losses, False)          # third step of joint
if fault == 'while saving weights':
    replace = os.replace
    def half(a, b):
        if Path(b).name == 'head.safetensors' and Path(b).parent.name == 'joint': die()        # written, not renamed
        replace(a, b)
    os.replace = half
if fault == 'while saving the state':
    import safetensors.torch
    save = safetensors.torch.save_file
    def torn(tensors, path, **k):                             # the second state of joint is half written
        if Path(path).parent.name == 'joint' and (Path(path).parent / 'resume.safetensors').is_file():
            Path(path).write_bytes(b'half')
            die()
        save(tensors, path, **k)
    safetensors.torch.save_file = torn
if fault == 'between stages': training._finish = nth(1, training._finish, False)
if fault == 'asked to stop':
    losses = training.stage_losses
    def ask(*a): training.stage_losses = losses; os.kill(os.getpid(), signal.SIGTERM); return losses(*a)
    training.stage_losses = ask
for stage in ('warmup', 'joint'): training.run_stage('smoke', 'protoseg', stage, out=out, device='cpu')
'''


def run(fault, out):
    return subprocess.run([sys.executable, '-c', SCRIPT, fault, str(out)], capture_output=True, text=True)


def facts(folder):
    metrics = json.loads((folder / 'metrics.json').read_text())
    rows = [{k: v for k, v in r.items()} for r in csv.DictReader(open(folder / 'log.csv'))]
    return {k: v for k, v in metrics.items() if k not in ('memory_mb', 'seconds_training')}, rows


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    from scaleprotoseg.training import run_stage
    out = tmp_path_factory.mktemp('pretrained')
    run_stage('smoke', 'pretrain', 'joint', out=out, device='cpu')
    return out


@pytest.fixture(scope='module')
def uninterrupted(pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole') / 'runs'
    shutil.copytree(pretrained, out)
    result = run('none', out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize('fault', [pytest.param('in a step', marks=pytest.mark.slow), 'while saving weights', 'while saving the state',
                                   pytest.param('between stages', marks=pytest.mark.slow)])
def test_killed_and_run_again_is_the_same_run(fault, pretrained, uninterrupted, tmp_path):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    assert run(fault, out).returncode == -signal.SIGKILL
    joint = out / 'smoke/protoseg/seed0/joint'
    assert not (joint / 'metrics.json').exists(), 'a killed stage must not look finished'
    again = run('none', out)
    assert again.returncode == 0, again.stderr
    for stage in ('warmup', 'joint'):
        a, b = out / f'smoke/protoseg/seed0/{stage}', uninterrupted / f'smoke/protoseg/seed0/{stage}'
        assert facts(a) == facts(b)
        for name in ('backbone', 'head') + (('best_backbone', 'best_head') if stage == 'joint' else ()):
            x, y = read_tensors(a / f'{name}.safetensors'), read_tensors(b / f'{name}.safetensors')
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), f'{stage} {name}'
        assert not (a / 'resume.safetensors').exists() and not list(a.glob('.*.tmp'))
    pieces = json.loads((out / 'smoke/protoseg/seed0/joint/provenance.json').read_text())
    assert pieces['sessions'] == (1 if fault == 'between stages' else 2) and pieces['precision'] == '32-true' and pieces['seconds'] > 0


def test_the_commit_is_that_of_the_code_that_ran(monkeypatch, tmp_path):
    from scaleprotoseg import runs
    from scaleprotoseg.recipes import find_recipe
    sessions = [{'device': 'cpu', 'precision': '32-true', 'commit': c, 'seconds': 1.} for c in ('a1', 'a1', 'b2')]
    made = runs.provenance(find_recipe('smoke', 'pretrain'), 0, 'joint', {}, sessions)
    assert made['commit'] == 'a1; then b2' and made['device'] == 'cpu' and made['sessions'] == 3
    assert runs.provenance(find_recipe('smoke', 'pretrain'), 0, 'joint', {}, [{k: v for k, v in sessions[0].items() if k != 'commit'}])['commit'] == 'unknown'
    runs.commit.cache_clear()
    first = runs.commit()
    monkeypatch.setattr(runs.subprocess, 'run', lambda *a, **k: pytest.fail('asked again'))
    assert runs.commit() == first


@pytest.mark.parametrize('status, expected', [('', 'abc'), (' M scaleprotoseg/heads.py\n', 'abc-dirty'), (None, 'unknown')])
def test_the_commit_says_whether_the_code_was_changed(monkeypatch, status, expected):
    from scaleprotoseg import runs
    def git(command, **options):
        if status is None: raise FileNotFoundError('git')
        text = {'rev-parse': 'abc\n', 'status': status}.get(command[3], '')
        if command[3] == 'status': assert command[-1] == ':(top)scaleprotoseg'          # figures and notebooks train nothing
        return subprocess.CompletedProcess(command, 0, text, '')
    monkeypatch.setattr(runs.subprocess, 'run', git)
    runs.commit.cache_clear()
    try: assert runs.commit() == expected
    finally: runs.commit.cache_clear()


def test_a_copy_without_its_history_says_what_it_was_told(monkeypatch):
    from scaleprotoseg import runs
    def git(command, **options): raise subprocess.CalledProcessError(128, command)
    monkeypatch.setattr(runs.subprocess, 'run', git)
    monkeypatch.setenv('SCALEPROTOSEG_COMMIT', 'abc')
    runs.commit.cache_clear()
    try: assert runs.commit() == 'abc'
    finally: runs.commit.cache_clear()


def test_a_stop_in_a_validation_costs_one_update(pretrained, tmp_path, monkeypatch):
    from scaleprotoseg import training
    from safetensors import safe_open
    shutil.copytree(pretrained, tmp_path / 'runs')
    options = dict(out=tmp_path / 'runs', device='cpu')
    training.run_stage('smoke', 'protoseg', 'warmup', **options)
    def stopped(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, '_keep_best', stopped)                              # after the second of three updates
        training.run_stage('smoke', 'protoseg', 'joint', **options)
    with safe_open(tmp_path / 'runs/smoke/protoseg/seed0/joint/resume.safetensors', 'pt') as f: assert json.loads(f.metadata()['position'])['step'] == 1
    assert training.run_stage('smoke', 'protoseg', 'joint', **options)


def test_best_weights_are_those_of_the_best_validation(uninterrupted):
    from scaleprotoseg.metrics import mean_iou
    from scaleprotoseg.model import load_model
    from scaleprotoseg.recipes import find_recipe
    from scaleprotoseg.training import Job, evaluate
    recipe = find_recipe('smoke', 'protoseg')
    job = Job(recipe, recipe.stage('joint'), 0, uninterrupted, None, None, lambda: '')
    score = lambda prefix: mean_iou(evaluate(load_model(job.folder, prefix), job.data('val'), torch.device('cpu')))
    metrics = json.loads((job.folder / 'metrics.json').read_text())
    assert recipe.stage('joint').train.eval_every == 2          # of 3 updates: validated after the second and at the end
    assert score('') == metrics['miou'] and score('best_') == metrics['best']['miou'] >= metrics['miou']
    assert metrics['best']['step'] in (2, 3)


def test_asked_to_stop_it_saves_and_the_same_command_continues(pretrained, uninterrupted, tmp_path):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    stopped = run('asked to stop', out)
    assert stopped.returncode == 1 and 'stopped by SIGTERM after step 1 of 2; the same command continues it' in stopped.stderr
    assert (out / 'smoke/protoseg/seed0/warmup/resume.safetensors').exists()
    assert run('none', out).returncode == 0
    assert facts(out / 'smoke/protoseg/seed0/joint') == facts(uninterrupted / 'smoke/protoseg/seed0/joint')


def test_time_that_is_up_ends_with_code_3(pretrained, tmp_path):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    command = [sys.executable, '-m', 'scaleprotoseg', 'run', 'smoke', 'protoseg', '--out', str(out), '--device', 'cpu', '--max-minutes', '1e-6']
    stopped = subprocess.run(command, capture_output=True, text=True)
    assert stopped.returncode == 3 and 'out of time' in stopped.stderr and 'Traceback' not in stopped.stderr


def test_a_second_writer_waits_and_finds_the_work_done(pretrained, tmp_path):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    command = [sys.executable, '-m', 'scaleprotoseg', 'run', 'smoke', 'protoseg', '--stage', 'warmup', '--out', str(out), '--device', 'cpu']
    with (tmp_path / 'log').open('w') as log:
        both = [subprocess.Popen(command, stderr=log, stdout=log) for _ in range(2)]
        assert [p.wait(120) for p in both] == [0, 0]
    assert (tmp_path / 'log').read_text().count('seed 0 warmup: mIoU') == 1, 'trained once'


def test_waiting_for_another_writer_ends_when_time_is_up(pretrained, tmp_path):
    from scaleprotoseg.basics import Interrupted
    from scaleprotoseg.runs import locked
    from scaleprotoseg.training import run_stage
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    with locked(out / 'smoke/protoseg/seed0/warmup'), pytest.raises(Interrupted, match='out of time while another process'):
        run_stage('smoke', 'protoseg', 'warmup', out=out, device='cpu', max_minutes=0.01)


def test_what_a_killed_writer_left_is_swept(pretrained, tmp_path):
    from scaleprotoseg.training import run_stage
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    done, begun = out / 'smoke/pretrain/seed0/joint', out / 'smoke/protoseg/seed0/warmup'
    begun.mkdir(parents=True)
    leftovers = [done / 'resume.safetensors', begun / '.head.safetensors.1.tmp']     # after metrics.json; before a rename
    for path in leftovers: path.write_bytes(b'half')
    run_stage('smoke', 'pretrain', 'joint', out=out, device='cpu')
    run_stage('smoke', 'protoseg', 'warmup', out=out, device='cpu')
    assert not any(path.exists() for path in leftovers)


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    from scaleprotoseg.training import stopping
    with stopping(None) as stop:
        signal.raise_signal(signal.SIGINT)                                          # asks; the step goes on
        assert stop() == 'stopped by SIGINT'
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)


def test_finished_work_of_another_recipe_is_neither_used_nor_overwritten(pretrained, tmp_path):
    from dataclasses import replace
    from scaleprotoseg import recipes
    from scaleprotoseg.training import run_stage
    old = recipes.RECIPES['smoke/pretrain']
    stage = replace(old.stages[0], train=replace(old.stages[0].train, steps=4))
    recipes.RECIPES['smoke/pretrain'] = replace(old, stages=(stage,))
    try:
        with pytest.raises(ValueError, match='another recipe'): run_stage('smoke', 'pretrain', 'joint', out=pretrained, device='cpu')
    finally: recipes.RECIPES['smoke/pretrain'] = old


GROUP = '''
import os, signal, time
from scaleprotoseg.data import open_dataset
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.training import StepBatches
batches = StepBatches(open_dataset('partscapes', 'train', n=2, size=(64, 96)), find_recipe('smoke', 'protoseg').data, [0.] * 3, 0, 'joint')
signal.signal(signal.SIGTERM, lambda *a: print('asked'))
loader = batches.loader([range(p, p + 1) for p in range(40)], workers=2)      # which have hardly started
'''
ASKED = GROUP + '''
os.killpg(0, signal.SIGTERM)
time.sleep(.5)
print(sum(1 for _ in loader))
'''
ONE_DIES = GROUP + '''
import multiprocessing
next(loader)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
sum(1 for _ in loader)
'''
ANOTHER_CHILD = '''
import multiprocessing, signal, sys
def wait(ready):
    signal.signal(signal.SIGTERM, lambda *a: (print('asked, not killed', flush=True), sys.exit()))
    ready.set()
    signal.pause()
fork = multiprocessing.get_context('fork')
ready = fork.Event()
fork.Process(target=wait, args=(ready,), daemon=True).start()
ready.wait()
''' + GROUP + '''
next(loader)
raise SystemExit(1)
'''


def test_a_signal_to_all_processes_of_a_job_leaves_the_loaders_workers_alone():
    done = subprocess.run([sys.executable, '-c', ASKED], capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.stdout.split() == ['asked', '40'], done.stderr


def test_a_program_whose_worker_died_ends():
    done = subprocess.run([sys.executable, '-c', ONE_DIES], capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.returncode == 1 and 'Traceback' in done.stderr        # of which error depends on what the worker was at


def test_a_program_that_ends_kills_the_workers_of_its_loaders_and_no_other_child():
    done = subprocess.run([sys.executable, '-c', ANOTHER_CHILD], capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.returncode == 1 and done.stdout.split('\n') == ['asked, not killed', ''], done.stderr
