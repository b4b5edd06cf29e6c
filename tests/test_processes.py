"""Two processes make what one makes: the same losses, projection, pruning and mIoU, also when they are killed and go on."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scaleprotoseg.data import open_dataset
from scaleprotoseg.model import read_tensors
from scaleprotoseg.pruning import NearestPatches
from scaleprotoseg.projection import Projection
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.training import Job, Share, _leave, check_division, processes, run_method

ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
FOLDER = 'smoke/protoseg/seed0'
LAUNCH = ('-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m', 'scaleprotoseg')

# The fault is injected from outside, into the second process.
SCRIPT = '''
import os, signal, sys
import scaleprotoseg.training as training
from scaleprotoseg.basics import Interrupted
fault, out = sys.argv[1], sys.argv[2]
training.SAVE_SECONDS, count, losses = 0., [0], training.stage_losses
def faulty(*a):
    count[0] += 1
    if count[0] == 5 and os.environ.get('LOCAL_RANK') == '1':          # the third update of joint
        if fault == 'killed': os.kill(os.getpid(), signal.SIGKILL)
        if fault == 'asked': os.kill(os.getpid(), signal.SIGTERM)
    return losses(*a)
training.stage_losses = faulty
try:
    for stage in ('warmup', 'joint'): training.run_stage('smoke', 'protoseg', stage, out=out, device='cpu', devices=2)
except Interrupted as e: sys.exit(f'stopped: {e}')
'''


def command(*arguments, launch=('-m', 'scaleprotoseg')):
    result = subprocess.run([sys.executable, *launch, *map(str, arguments)], capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    return result


def train(out, *options, **launch): command('run', 'smoke', 'protoseg', '--out', out, '--device', 'cpu', *options, **launch)


def log(folder): return [{k: float(v) for k, v in r.items()} for r in csv.DictReader((folder / 'log.csv').open())]


def equal(a, b):
    x, y = (read_tensors(f / 'head.safetensors') for f in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp('pretrained') / 'runs'
    command('run', 'smoke', 'pretrain', '--out', out, '--device', 'cpu')
    return out


@pytest.fixture(scope='module')
def one(pretrained, tmp_path_factory):
    out = shutil.copytree(pretrained, tmp_path_factory.mktemp('one') / 'runs')
    train(out)
    return out / FOLDER


@pytest.fixture(scope='module')
def two(pretrained, tmp_path_factory):
    out = shutil.copytree(pretrained, tmp_path_factory.mktemp('two') / 'runs')
    train(out, launch=LAUNCH)
    return out / FOLDER


def test_two_processes_have_the_losses_of_one(pretrained, tmp_path):
    # in float64: the first updates of Adam are signs of the gradient, which make float32's rounding visible
    out = [shutil.copytree(pretrained, tmp_path / n) for n in ('one', 'two')]
    for runs, launch in zip(out, (('-m', 'scaleprotoseg'), LAUNCH)):
        for stage in ('warmup', 'joint'): train(runs, '--stage', stage, '--precision', '64-true', launch=launch)
    for stage in ('warmup', 'joint'):
        a, b = (log(o / FOLDER / stage) for o in out)
        assert [r.keys() for r in a] == [r.keys() for r in b]
        for x, y in zip(a, b): assert x == pytest.approx(y, abs=1e-6)
        whole, halved = (read_tensors(o / FOLDER / stage / 'head.safetensors') for o in out)
        for k in whole: torch.testing.assert_close(whole[k], halved[k], rtol=0, atol=1e-12)      # nothing between was float32
    train(out[0], '--stage', 'project', '--precision', '64-true', launch=('-m', 'scaleprotoseg'))
    patches = read_tensors(out[0] / FOLDER / 'project/head.safetensors')['prototypes.vectors']
    assert patches.dtype == torch.float64 and (patches != patches.float().double()).any()      # features of float64, not rounded ones


def test_prototypes_that_follow_their_pixels_follow_those_of_both_processes(pretrained, tmp_path):
    found = []
    for name, launch in (('one', ('-m', 'scaleprotoseg')), ('two', LAUNCH)):
        runs = shutil.copytree(pretrained, tmp_path / name)
        command('run', 'smoke', 'prototype_view', '--stage', 'joint', '--out', runs, '--device', 'cpu', '--precision', '64-true', launch=launch)
        folder = runs / 'smoke/prototype_view/seed0/joint'
        found.append((log(folder), read_tensors(folder / 'head.safetensors')['prototypes.vectors']))
    (a, x), (b, y) = found
    for one, two in zip(a, b, strict=True): assert one == pytest.approx(two, abs=1e-6)
    assert {'ce', 'contrast', 'distance'} <= a[0].keys() and torch.allclose(x.norm(dim=-1), torch.ones((), dtype=x.dtype))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_two_processes_in_single_precision_differ_by_rounding(one, two):
    for stage in ('warmup', 'joint'):
        for a, b in zip(log(one / stage), log(two / stage)): assert a == pytest.approx(b, rel=1e-3)
        assert log(one / stage)[0] == pytest.approx(log(two / stage)[0], abs=1e-5)      # from the same weights
    made = json.loads((two / 'joint/provenance.json').read_text())
    assert re.fullmatch('2 x cpu .+, threads: 1', made['device'])
    for stage in find_recipe('smoke', 'protoseg').stages: assert (two / stage.name / 'metrics.json').is_file()


DTYPES = '''
import os, sys
import torch
from scaleprotoseg.training import run_stage
seen = set()
def note(module, inputs, output):
    if isinstance(module, torch.nn.Conv2d): seen.add((torch.is_grad_enabled(), output.dtype))
torch.nn.modules.module.register_module_forward_hook(note)
folder = run_stage('smoke', 'protoseg', 'warmup', out=sys.argv[1], device='cpu', devices=int(sys.argv[2]), precision='bf16-mixed')
if os.environ.get('LOCAL_RANK', '0') == '0': print(sorted((grad, str(dtype)) for grad, dtype in seen))
'''


@pytest.mark.parametrize('devices', [1, 2])
def test_mixed_precision_is_the_networks_while_it_is_trained(devices, pretrained, one, tmp_path):
    out, script = shutil.copytree(pretrained, tmp_path / 'runs'), tmp_path / 'script.py'
    script.write_text(DTYPES)
    done = subprocess.run([sys.executable, script, out, str(devices)], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.stdout == "[(False, 'torch.float32'), (True, 'torch.bfloat16')]\n", done.stderr           # validated in float32
    folder = out / FOLDER / 'warmup'
    assert json.loads((folder / 'provenance.json').read_text())['precision'] == 'bf16-mixed'
    assert {v.dtype for v in read_tensors(folder / 'head.safetensors').values()} <= {torch.float32, torch.bool}
    for mixed, full in zip(log(folder), log(one / 'warmup')): assert mixed == pytest.approx(full, rel=.05) and mixed != full


def test_a_head_that_is_trained_alone_sees_what_evaluation_shows_it():
    stages = {s.name: s for s in find_recipe('em', 'scaleprotoseg').stages}           # its heads are trained on images, not on kept maps
    def half(stage, precision):
        job = SimpleNamespace(stage=stages[stage], precision=precision, fabric=SimpleNamespace(device=torch.device('cpu')))
        with Job.mixed(job): return torch.is_autocast_enabled('cpu')
    assert half('joint', 'bf16-mixed') and not half('joint', '32-true')
    assert not any(half(stage, 'bf16-mixed') for stage in ('finetune', 'group_joint'))


def test_projection_pruning_and_miou_are_identical(one, tmp_path):
    again = shutil.copytree(one.parents[2], tmp_path / 'runs') / FOLDER
    for stage in ('project', 'prune'):
        shutil.rmtree(again / stage)
        train(tmp_path / 'runs', '--stage', stage, '--devices', 2)
        assert equal(one / stage, again / stage)
        for name in ('prototypes.json', 'patches.webp', *(['prune.json'] if stage == 'prune' else [])):
            assert (one / stage / name).read_bytes() == (again / stage / name).read_bytes(), name
        a, b = (json.loads((f / stage / 'metrics.json').read_text()) for f in (one, again))
        assert a | {'memory_mb': 0} == b | {'memory_mb': 0}


@pytest.mark.parametrize('fault', ['killed', pytest.param('asked', marks=pytest.mark.slow)])
def test_stopped_and_run_again_is_the_same_run(fault, pretrained, two, tmp_path):
    out = shutil.copytree(pretrained, tmp_path / 'runs')
    run = lambda fault: subprocess.run([sys.executable, script, fault, str(out)], capture_output=True, text=True, env=ENV, timeout=120)
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    stopped = run(fault)
    if fault == 'killed': assert stopped.returncode != 0
    else: assert 'joint: another process was stopped after step 3 of 3' in stopped.stderr
    assert not (out / FOLDER / 'joint/metrics.json').exists()
    again = run('none')
    assert again.returncode == 0, again.stderr
    for stage in ('warmup', 'joint'):
        assert log(out / FOLDER / stage) == log(two / stage) and equal(out / FOLDER / stage, two / stage)
    assert json.loads((out / FOLDER / 'joint/provenance.json').read_text())['sessions'] == 2


def test_a_run_that_ends_is_not_killed_for_a_process_that_is_slower_to_leave():
    from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
    asleep = [sys.executable, '-c', 'import time; time.sleep(60)']
    with subprocess.Popen(asleep) as this, subprocess.Popen(asleep) as slower:
        launcher = SimpleNamespace(procs=[slower])
        observer = _ChildProcessObserver(this.pid, launcher.procs)     # what Lightning has beside a run
        _leave(launcher)
        assert slower.wait(10) == -signal.SIGTERM
        assert observer._run()
        this.terminate()
        assert this.wait(10) == -signal.SIGTERM       # and not what Lightning sends


def test_what_cannot_be_divided_is_said_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match='warmup of smoke/protoseg has 2 images per update, which 3 processes cannot.*possible: 1, 2$'):
        run_method('smoke', 'protoseg', out=tmp_path, device='cpu', devices=3)
    with pytest.raises(ValueError, match='joint of smoke/pretrain trains batch norm'):
        run_method('smoke', 'pretrain', out=tmp_path, device='cpu', devices=2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='devices=-1'): processes(-1)
    recipe = find_recipe('pascal', 'scaleprotoseg')
    for n in (2, 5, 10): check_division(recipe, recipe.stages, 'cpu', n)


def test_number_of_processes_is_that_of_the_launcher(monkeypatch):
    for name in ('LOCAL_WORLD_SIZE', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NNODES'): monkeypatch.delenv(name, raising=False)
    assert processes() == (1, 1) and processes(4) == (4, 1)
    for name, value in dict(SLURM_PROCID=3, SLURM_NTASKS=8, SLURM_NNODES=2).items(): monkeypatch.setenv(name, str(value))
    assert processes() == (4, 2)
    for name, value in dict(LOCAL_WORLD_SIZE=2, WORLD_SIZE=6).items(): monkeypatch.setenv(name, str(value))
    assert processes() == (2, 3)


@pytest.mark.parametrize('world', [2, 3, 8])
def test_merged_shares_are_the_whole(world):
    """Few different distances, so that many are equal: of equals the earlier image counts, whoever saw it."""
    torch.manual_seed(world)
    S, C, K, D, n, grid = 2, 3, 4, 2, 7, (3, 4)
    prototypes = Prototypes(S, C, K, D)
    alive = torch.rand(S, C, K) > .2
    prototypes.kill_(~alive)
    images = [(torch.rand(1, S, D, *grid), torch.randint(0, 4, (1, S, C, K, *grid)) / 4., torch.randint(-1, C - 1, (1, *grid))) for _ in range(n)]
    def look(indices):
        projection, nearest = Projection(prototypes), NearestPatches(prototypes, 3)
        for i in indices:
            features, distances, label = images[i]
            projection.update(i, features, distances, -distances, label)
            nearest.update(i, distances, label)
        return projection, nearest
    (projection, nearest), *others = [look(range(r, n, world)) for r in range(world)]
    for p, q in others:
        projection.merge_(p)
        nearest.merge_(q)
    whole, whole_nearest = look(range(n))
    for name in ('vectors', 'distance', 'image', 'cell'): assert torch.equal(getattr(projection, name), getattr(whole, name)), name
    assert projection.maps.keys() == whole.maps.keys() and all((projection.maps[k] == whole.maps[k]).all() for k in whole.maps)
    assert projection.first[0] == 0 and torch.equal(projection.first[1], whole.first[1])
    for name in ('distance', 'facts'): assert torch.equal(getattr(nearest, name), getattr(whole_nearest, name)), name
    assert nearest.images == whole_nearest.images


def test_shares_cover_a_dataset_once():
    recipe = find_recipe('smoke', 'protoseg')
    dataset = open_dataset('partscapes', **recipe.data.splits['val'])
    shares = [Share(dataset, r, 3) for r in range(3)]
    assert sorted(i for s in shares for i in s.indices) == list(range(len(dataset))) and all(s.labels is dataset.labels for s in shares)
    assert all(s[j].id == s.ids[j] == dataset.ids[i] for s in shares for j, i in enumerate(s.indices))
