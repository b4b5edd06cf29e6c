"""The smoke graph, once as a user runs it and once with its parent killed."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pytest

from scaleprotoseg.contents import PAPER_NOTEBOOKS
from scaleprotoseg.measures import held_out, held_out_claims, held_out_scores
from scaleprotoseg.model import load_model
from scaleprotoseg.notebooks import run_notebook
from scaleprotoseg.recipes import find_recipe, recipes_of
from scaleprotoseg.records import collect

ROOT = Path(__file__).parents[1]
# One core: a training takes all that there are, and with several threads sums may differ in the last bit from run to run.
COMMAND = [sys.executable, '-m', 'scaleprotoseg', 'reproduce', '--experiment', 'smoke', '--device', 'cpu', '--cores', '1']


def checkout(folder):
    """What the graph needs of a checkout; the package itself is installed."""
    for name in ('Snakefile', 'settings.ini', 'nbs', 'data/published'):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return folder


def environment():
    return {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}


def scores(folder):
    return {str(p.relative_to(folder)): {k: v for k, v in json.loads(p.read_text()).items() if k not in ('memory_mb', 'seconds_training')}
            for p in sorted(folder.glob('runs/smoke/*/seed0/*/metrics.json'))}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = checkout(tmp_path_factory.mktemp('whole'))
    done = subprocess.run(COMMAND, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def test_graph_makes_every_stage_and_an_offline_report(whole):
    finished = scores(whole)
    assert len(finished) == sum(len(r.stages) for r in recipes_of('smoke'))
    page = (whole / 'figures/smoke/report.html').read_text()
    assert 'data:image/webp;base64' in page
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page), 'needs the network'
    assert str(whole) not in page and str(ROOT) not in page, 'a path of a machine'


def test_scores_on_held_out_images_are_measured_kept_and_recorded(whole, tmp_path):
    recipe, stage = find_recipe('smoke', 'deeplabv2'), 'joint'
    runs = shutil.copytree(whole / 'runs', tmp_path / 'runs')
    kept = runs / 'smoke/deeplabv2/seed0/joint/held_out.json'
    found = json.loads(kept.read_text())
    recorded = json.loads((whole / 'figures/smoke/provenance.json').read_text())['deeplabv2/seed0/joint']
    assert recorded['held_out']['miou'] == found['miou'] and recorded['metrics']['miou'] != found['miou']
    kept.write_text(json.dumps(found | {'miou': .5}))
    assert held_out_scores(runs, recipe, 0, stage)['miou'] == .5                      # not measured again
    kept.write_text(json.dumps(found | {'miou': .5, 'metrics': 'of others'}))
    again = held_out_scores(runs, recipe, 0, stage, device='cpu')
    assert again['miou'] == pytest.approx(found['miou']) and json.loads(kept.read_text()) == again
    kept.unlink()
    (kept.parent / 'backbone.safetensors').unlink()                                   # as `pack` leaves it
    asked = held_out_claims('smoke')
    rows, classes = held_out(runs, collect(runs, 'smoke'), asked)
    assert 'deeplabv2' not in set(rows.method) and {'protoseg', 'scaleprotoseg'} <= set(rows.method) == set(classes.method)
    for changed in ({'data': 'other images'}, {'files': 'of other contents'}):
        kept.write_text(json.dumps(found | changed))
        with pytest.raises(ValueError, match='different held-out images'): held_out(runs, collect(runs, 'smoke'), asked)
    kept.write_text(json.dumps({k: v for k, v in found.items() if k != 'files'}))     # measured before files were looked at
    assert 'deeplabv2' in set(held_out(runs, collect(runs, 'smoke'), asked)[0].method)
    with pytest.raises(KeyError, match="unknown dataset with held-out images 'em'"): held_out_scores(runs, find_recipe('em-quick', 'unet'), 0, stage)


def test_second_call_has_nothing_to_do(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob('*') if p.is_file() and '.snakemake' not in p.parts}
    done = subprocess.run(COMMAND, cwd=whole, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and 'Nothing to be done' in done.stdout + done.stderr
    changed = [p for p in before if p.stat().st_mtime_ns != before[p] and p.name != '.lock']
    assert not changed


def test_a_changed_rule_text_does_not_train_again(whole):
    text = (whole / 'Snakefile').read_text()
    (whole / 'Snakefile').write_text(text.replace('scaleprotoseg run {EXPERIMENT}', 'scaleprotoseg run  {EXPERIMENT}'))
    done = subprocess.run(COMMAND, cwd=whole, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and 'Nothing to be done' in done.stdout + done.stderr


def test_a_reading_notebook_also_runs_from_its_own_folder(whole, tmp_path):
    """As JupyterLab starts it; papermill starts it in the root."""
    folder = whole / 'nbs/paper/scaleprotoseg'
    command = [sys.executable, '-m', 'scaleprotoseg', 'notebook', 'table_01.ipynb', str(tmp_path / 'table_01.ipynb'), '-p', 'experiment=smoke']
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / 'figures').exists() and not (folder / 'runs').exists()


@pytest.mark.parametrize('notebook', [n for n in PAPER_NOTEBOOKS if not n.suits('smoke')], ids=lambda n: f'{n.paper}-{n.name}')
def test_notebooks_that_are_for_other_data_run_on_the_smoke_size_too(whole, notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(whole)
    run_notebook(f'nbs/paper/{notebook.paper}/{notebook.name}.ipynb', tmp_path / 'x.ipynb',
                 {'experiment': 'smoke', 'out': str(tmp_path / 'figures')})
    assert list((tmp_path / f'figures/smoke/{notebook.paper}').glob(f'{notebook.name}*.*'))


def test_where_nothing_has_failed_the_weakest_places_are_explained(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole)
    run_notebook('nbs/paper/scaleprotoseg/failure_cases.ipynb', tmp_path / 'x.ipynb',
                 {'experiment': 'smoke', 'out': str(tmp_path / 'figures'), 'threshold': 0., 'min_pixels': 1, 'weakest': 2})
    table = pd.read_csv(tmp_path / 'figures/smoke/scaleprotoseg/failure_cases.csv')
    every = pd.read_csv(whole / 'figures/smoke/scaleprotoseg/failure_cases.csv')
    caption = (tmp_path / 'figures/smoke/scaleprotoseg/failure_cases.md').read_text().splitlines()[0]
    assert 'lowest IoU (none is below 0)' in caption and len(table) >= 2 and table.IoU.max() <= every.IoU.max()


WITHOUT_JUPYTER = '''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('IPython', 'ipykernel', 'jupyter_client', 'nbformat', 'papermill', 'snakemake', 'nbdev'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from scaleprotoseg.cli import main
sys.argv = ['scaleprotoseg', *sys.argv[1:]]
main()
'''


@pytest.mark.slow     # every notebook once more
def test_results_travel_from_a_host_without_jupyter(whole, tmp_path):
    def command(*arguments, cwd=whole):
        done = subprocess.run([sys.executable, '-c', WITHOUT_JUPYTER, *map(str, arguments)], cwd=cwd, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
    command('figures', 'smoke', '--figures', tmp_path / 'figures')
    made = sorted((tmp_path / 'figures').rglob('*.csv'))
    assert made
    timed = {'table_10.csv', 'table_10_speed.csv'}
    for path in made:
        again = whole / 'figures' / path.relative_to(tmp_path / 'figures')
        if path.name == 'overview.csv':
            a, b = (pd.read_csv(p, dtype=str).drop(columns='per_second') for p in (path, again))
            assert a.equals(b)
        else: assert path.name in timed or path.read_bytes() == again.read_bytes(), path.name
    command('pack', 'smoke', tmp_path / 'smoke.tar.gz', '--figures', tmp_path / 'figures')
    elsewhere = checkout(tmp_path / 'elsewhere')
    with tarfile.open(tmp_path / 'smoke.tar.gz') as archive: archive.extractall(elsewhere, filter='data')
    assert not list((elsewhere / 'runs').rglob('*backbone*'))
    with pytest.raises(FileNotFoundError, match='expected a safetensors file; packed results have none'): load_model(elsewhere / 'runs/smoke/protoseg/seed0/project')
    command('report', 'smoke', cwd=elsewhere)
    here, there = ((f / 'figures/smoke/report.html').read_text() for f in (whole, elsewhere))
    assert there.count('<figure>') == here.count('<figure>') > 10 and there.count('<table>') == here.count('<table>')
    assert 'Not built' not in there


def test_killed_parent_then_the_same_command_ends_with_the_same_numbers(whole, tmp_path):
    folder, recipe = checkout(tmp_path), find_recipe('smoke', 'protoseg')
    shutil.copytree(whole / 'runs/smoke/pretrain', folder / 'runs/smoke/pretrain')
    command = [*COMMAND, '--target', f'runs/{recipe.name}/seed0/finished-{recipe.graph_digest()}.json']
    with (tmp_path / 'first.log').open('w') as log:
        first = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        deadline = time.time() + 120
        while not (folder / f'runs/{recipe.name}/seed0/warmup/recipe.json').is_file():
            assert first.poll() is None and time.time() < deadline, (tmp_path / 'first.log').read_text()[-3000:]
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)       # only the parent: the training job goes on writing
        first.wait()
    again = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-6000:]
    found, expected = scores(folder), scores(whole)
    assert len(found) == len(recipe.stages) + len(find_recipe('smoke', recipe.init).stages)
    assert all(expected[name] == found[name] for name in found)
