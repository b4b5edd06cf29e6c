"""Every notebook runs top to bottom: the chapters of the library in process, one item each; the others under papermill."""
from pathlib import Path

import pytest
import torch

from scaleprotoseg import backbones, data
from scaleprotoseg.model import read_tensors
from scaleprotoseg.notebooks import run_notebook
from scaleprotoseg.training import run_stage

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('notebook', CHAPTERS, ids=lambda p: p.stem)
def test_chapter_runs(notebook, monkeypatch):
    from nbdev.test import test_nb
    for registry in (backbones.BACKBONES, data.DATASETS):     # a chapter registers its own copies
        for name, value in registry.items(): monkeypatch.setitem(registry, name, value)
    ok, _ = test_nb(notebook, do_print=False, showerr=True)
    assert ok, f'{notebook.name} failed; its traceback is above'


def test_stage_notebook_and_function_give_equal_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_notebook(ROOT / 'nbs/stages/train.ipynb', tmp_path / 'train.ipynb',
                 {'experiment': 'smoke', 'method': 'pretrain', 'stage': 'joint', 'out': str(tmp_path / 'a'), 'device': 'cpu'})
    direct = run_stage('smoke', 'pretrain', 'joint', out=tmp_path / 'b', device='cpu')
    for name in ('backbone', 'head'):
        there = read_tensors(tmp_path / f'a/smoke/pretrain/seed0/joint/{name}.safetensors')
        here = read_tensors(direct / f'{name}.safetensors')
        assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in here)


@pytest.mark.parametrize('notebook', sorted((ROOT / 'nbs/tutorials').glob('*.ipynb')), ids=lambda p: p.stem)
def test_tutorial_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_notebook(notebook, tmp_path / notebook.name, {})
