"Tables, figures, notebooks with parameters and the report, on runs that the tests write themselves."
import json
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from scaleprotoseg import report
from scaleprotoseg.data import Labels, Sample
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.report import (
    NotebookFailed,
    accuracy_table,
    build_report,
    check_parameters,
    collect,
    compare,
    find_published,
    notebook_parameters,
    paper_notebooks,
    plot_comparison,
    provenance_text,
    published,
    run_notebook,
    save_figure,
    save_table,
    steps_table,
    without_machine_paths,
)
from scaleprotoseg.runs import run_folder

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / 'data/published'
COLUMNS = ['method', 'step', 'setting', 'data', 'metric', 'value', 'std', 'source', 'note']


def finish(runs, experiment, method, stage, seed=0, miou=0.5, provenance=True, **prototypes):
    "The two JSON files of a finished stage."
    recipe = find_recipe(experiment, method)
    folder = run_folder(runs, recipe, seed, stage)
    folder.mkdir(parents=True)
    (folder / 'metrics.json').write_text(json.dumps({
        'stage': stage, 'miou': miou, 'accuracy': .75, 'iou': {'a': None}, 'prototypes': prototypes,
        'memory_mb': {'process': 900}}))
    if provenance:
        (folder / 'provenance.json').write_text(json.dumps({
            'commit': 'c' * 40, 'recipe': recipe.digest(stage), 'seconds': 30.0, 'device': 'cpu, 2 threads',
            'finished': '2030-01-02T03:04:05+00:00',
            'data': {'val': {'dataset': recipe.data.dataset, 'images': 4}}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    "ScaleProtoSeg three times, ProtoSeg once, no black box."
    folder = tmp_path / 'runs'
    for seed, miou in enumerate((.50, .52, .57)):
        finish(folder, 'demo', 'scaleprotoseg', 'threshold', seed, miou, alive=100, active=60 + seed, total=120)
    for stage in ('finetune', 'prune_finetune'): finish(folder, 'demo', 'protoseg', stage, 0, .48, alive=90, total=100)
    return folder


def table_of(runs, experiment='demo', name='scaleprotoseg_table_01'):
    return accuracy_table(collect(runs, experiment), experiment, published(name, PUBLISHED)).set_index('method')


# what was run

def test_collect_has_a_row_per_finished_stage_and_seed(runs):
    (runs / 'demo/protoseg/seed0/project').mkdir()                  # begun, not finished
    (runs / 'demo/protoseg/seed0/other').mkdir()                    # not a stage
    frame = collect(runs, 'demo')
    assert list(zip(frame.method, frame.stage, frame.seed)) == [
        ('protoseg', 'finetune', 0), ('protoseg', 'prune_finetune', 0), *(('scaleprotoseg', 'threshold', s) for s in range(3))]
    assert frame.accuracy.unique().tolist() == [75.] and frame.seconds.sum() == 150


def test_collect_works_from_metrics_alone(tmp_path):
    finish(tmp_path, 'demo', 'linear', 'joint', provenance=False)
    frame = collect(tmp_path, 'demo')
    assert len(frame) == 1 and frame.commit.isna().all() and 'seed 0' in provenance_text(frame)


def test_collect_leaves_out_what_another_recipe_made(runs):
    for stage in ('finetune', 'prune_finetune'): (runs / f'demo/protoseg/seed0/{stage}/recipe.json').write_text('"0123456789ab"')
    with pytest.warns(UserWarning, match='0123456789ab'): frame = collect(runs, 'demo')
    assert 'protoseg' not in set(frame.method)


def test_collect_suggests_the_experiment(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'demo'"): collect(tmp_path, 'dema')


# tables

def test_mean_and_sample_deviation_are_over_seeds(runs):
    row = table_of(runs).loc['scaleprotoseg']
    assert row.runs == 3 and row.miou == pytest.approx(53) and row['std'] == pytest.approx(13 ** .5)


def test_one_seed_has_no_deviation(runs):
    assert table_of(runs).loc['protoseg', 'std'] is None


def test_what_was_not_run_is_a_dash_and_never_the_published_number(runs, tmp_path):
    table = table_of(runs).reset_index()
    text = save_table(table, tmp_path / 't', 'A caption.').set_index('method')
    row = text.loc['deeplabv2']
    assert row.published == '71.40' and row.verdict == 'not run' and row.runs == '0'
    assert {row[c] for c in ('miou', 'std', 'difference')} == {'—'}
    written = pd.read_csv(tmp_path / 't.csv', dtype=str).set_index('method')
    assert written.loc['deeplabv2', 'miou'] == '—' and '71.40' in (tmp_path / 't.md').read_text()


def test_other_data_are_shown_but_not_compared(runs):
    table = table_of(runs).loc[['protoseg', 'scaleprotoseg']]
    assert table.published.tolist() == [67.54, 68.97] and set(table.published_data) == {'Cityscapes val (other data)'}
    assert table.difference.isna().all() and table.verdict.isna().all()


@pytest.mark.parametrize('experiment, verdicts', [('em', {'agrees', 'below'}), ('em-quick', {'reduced schedule'})])
def test_em_is_compared_with_both_published_splits(tmp_path, experiment, verdicts):
    finish(tmp_path, experiment, 'scaleprotoseg', 'threshold', miou=.78, alive=24, active=20, total=24)
    table = table_of(tmp_path, experiment, 'scaleprotoseg_table_05').loc['scaleprotoseg']
    assert table.published.tolist() == [77.97, 79.29]
    assert table.published_data.tolist() == ['EM, split 1', 'EM, split 2']
    assert table.difference.tolist() == pytest.approx([.03, -1.29]) and set(table.verdict) == verdicts


@pytest.mark.parametrize('miou, std, verdict', [
    (69.9, None, 'agrees'), (70.1, None, 'above'), (67.9, None, 'below'), (70.1, 0.6, 'agrees')])
def test_verdict_allows_one_point_or_two_deviations(miou, std, verdict):
    row = compare({'miou': miou, 'std': std, 'runs': 3}, {'value': 69., 'std': .2}, 'Cityscapes val', same_data=True)
    assert row['verdict'] == verdict and row['difference'] == pytest.approx(miou - 69)


def test_a_method_that_only_starts_others_is_in_no_table(runs):
    assert list(table_of(runs).index) == ['deeplabv2', 'linear', 'protoseg', 'scaleprotoseg']


def test_steps_count_used_prototypes_after_grouping(runs):
    table = steps_table(collect(runs, 'demo'), 'demo', published('scaleprotoseg_table_02', PUBLISHED))
    table = table.set_index(['method', 'stage'])
    grouped, tuned = table.loc[('scaleprotoseg', 'threshold')], table.loc[('scaleprotoseg', 'finetune')]
    assert grouped.prototypes == 61 and type(grouped.prototypes) is int and grouped.published_prototypes == 111
    assert tuned.published_step == 'project' and tuned.published == 70.01
    assert tuned.miou is None and tuned.verdict == 'not run'
    assert table.loc[('protoseg', 'finetune'), 'prototypes'] == 90


# published numbers

def test_published_numbers_that_papers_repeat_agree():
    steps, sweep = published('scaleprotoseg_table_02', PUBLISHED), published('scaleprotoseg_table_07', PUBLISHED)
    for data in ('Cityscapes val', 'Pascal VOC val', 'ADE20K val'):
        here = find_published(steps, method='scaleprotoseg', step='grouped', data=data)
        there = find_published(sweep, data=data, setting='row 2, tau = 0.05')
        assert here == there
    assert find_published(steps, data='nowhere') == {}
    with pytest.raises(ValueError, match='published values'): find_published(steps, data='ADE20K val')


def test_missing_published_tables_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='checkout of the repository'): published('x', tmp_path / 'no')
    with pytest.raises(KeyError, match='scaleprotoseg_table_02'): published('scaleprotoseg_table_2', PUBLISHED)


# files

def test_same_table_and_figure_same_bytes(tmp_path, runs):
    for name in 'ab':
        save_table(table_of(runs).reset_index(), tmp_path / name / 't', 'One  caption\nin two lines.')
        fig = Figure(figsize=(1, 1))
        fig.subplots().plot([1, 2])
        save_figure(fig, tmp_path / name / 'f', 'What is shown.')
    files = sorted(p.name for p in (tmp_path / 'a').iterdir())
    assert files == ['f.pdf', 'f.png', 't.csv', 't.md']              # and no temporary file
    assert all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files)
    assert (tmp_path / 'a/t.md').read_text().startswith('One caption in two lines.\n\n| method |')
    with Image.open(tmp_path / 'a/f.png') as im: assert im.info['Description'] == 'What is shown.'


def test_a_bar_in_a_cell_does_not_break_the_markdown(tmp_path):
    save_table(pd.DataFrame({'a|b': ['c|d']}), tmp_path / 't', '')
    lines = (tmp_path / 't.md').read_text().strip().splitlines()
    assert [len(re.findall(r'(?<!\\)\|', line)) for line in lines] == [2, 2, 2]


def test_void_of_the_truth_is_black_in_every_prediction():
    labels = Labels(('a', 'b'), ((255, 0, 0), (0, 255, 0)))
    label = torch.zeros(4, 6, dtype=torch.int64); label[0] = -1
    prediction = torch.ones(4, 6, dtype=torch.int64)
    fig = plot_comparison([Sample(torch.zeros(3, 4, 6), label, 'x')], {'one': [prediction]}, labels)
    shown = fig.axes[2].images[0].get_array()
    assert (shown[0] == 0).all() and (shown[1:] == [0, 255, 0]).all()


# notebooks with parameters

PARAMETERS = 'size: int = 3  # how many\nrate: float = .5\nname: str = "a"\nfast: bool = False'

def book(path, *code, tags=('parameters',)):
    "A notebook with a title, a cell of parameters and more cells."
    v4, kernel = nbformat.v4, {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    cells = [v4.new_markdown_cell('# A title\n\n> A promise.'),
             v4.new_code_cell(PARAMETERS, metadata={'tags': list(tags)}), *map(v4.new_code_cell, code)]
    path.write_text(nbformat.writes(v4.new_notebook(cells=cells, metadata={'kernelspec': kernel})))
    return path


def test_parameters_have_type_default_and_help(tmp_path):
    size = notebook_parameters(book(tmp_path / 'a.ipynb'))['size']
    assert size == {'type': 'int', 'default': '3', 'help': 'how many'}


@pytest.mark.parametrize('parameters', [{}, {'size': 4, 'name': 'b'}, {'rate': 1}, {'rate': .1, 'fast': True}])
def test_right_parameters_pass(tmp_path, parameters):
    check_parameters(book(tmp_path / 'a.ipynb'), parameters)


@pytest.mark.parametrize('parameters, error, words', [
    ({'sise': 3}, KeyError, "unknown parameter.*'sise'.*did you mean 'size'"),
    ({'size': '3'}, TypeError, 'size .* is int'), ({'size': 3.5}, TypeError, 'size'),
    ({'size': True}, TypeError, 'size'), ({'name': 3}, TypeError, 'name .* is str'),
    ({'fast': 1}, TypeError, 'fast .* is bool'), ({'rate': 'high'}, TypeError, 'rate')])
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path, parameters, error, words):
    source = book(tmp_path / 'a.ipynb', 'open("ran", "w")')
    with pytest.raises(error, match=words): run_notebook(source, tmp_path / 'b.ipynb', parameters)
    assert [p.name for p in tmp_path.iterdir()] == ['a.ipynb']


def test_a_notebook_that_lost_its_tag_is_refused(tmp_path):
    book(tmp_path / 'a.ipynb', tags=())
    with pytest.raises(ValueError, match='tagged `parameters`'): check_parameters(tmp_path / 'a.ipynb', {})
    (tmp_path / 'c.ipynb').write_text('{')
    with pytest.raises(ValueError, match='not a notebook'): check_parameters(tmp_path / 'c.ipynb', {})
    with pytest.raises(FileNotFoundError, match='no notebook'): check_parameters(tmp_path / 'd.ipynb', {})


def test_executed_notebook_has_its_parameters_and_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = book(Path('a.ipynb'),
                  'import os, sys, warnings, pathlib\nprint(size, os.getcwd() + "/here", sys.prefix + "/lib")',
                  'warnings.warn("careful")\npathlib.Path.home() / "x"')
    target = run_notebook(source, 'out/b.ipynb', {'size': 4})
    text, nb = target.read_text(), nbformat.read(target, 4)
    assert nb.metadata.papermill.input_path == 'a.ipynb' and nb.metadata.papermill.output_path == 'out/b.ipynb'
    assert '4 here' in text and 'careful' in text
    for path in (tmp_path, Path.home(), ROOT, Path(report.__file__).parent): assert f'{path}/' not in text
    assert [p.name for p in target.parent.iterdir()] == ['b.ipynb']


def test_a_failing_cell_leaves_the_old_result(tmp_path):
    target = tmp_path / 'b.ipynb'
    target.write_text('old')
    source = book(tmp_path / 'a.ipynb', '1 / 0')
    with pytest.raises(NotebookFailed, match='ZeroDivisionError') as e: run_notebook(source, target, {})
    assert 'a.ipynb' in str(e.value) and target.read_text() == 'old' and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.name != 'posix', reason='sockets in files')
def test_notebooks_started_together_do_not_share_sockets(tmp_path, monkeypatch):
    addresses = []
    def execute(*args, config, **options):
        addresses.append(config.KernelManager.ip)
        assert Path(addresses[-1]).parent.is_dir() and config.KernelManager.transport == 'ipc'
        return nbformat.v4.new_notebook(metadata={'papermill': {}})
    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    for name in ('b', 'c'): run_notebook(book(tmp_path / 'a.ipynb'), tmp_path / f'{name}.ipynb', {})
    assert addresses[0] != addresses[1] and not any(Path(a).parent.exists() for a in addresses)


def test_pictures_in_notebooks_are_not_touched():
    home = f'{Path.home()}/x'
    assert without_machine_paths({'image/png': home, 'text': [home]}) == {'image/png': home, 'text': ['…/x']}


# the notebooks of the papers

@pytest.mark.parametrize('experiment', ['smoke', 'demo', 'em', 'em-quick'])
def test_every_listed_notebook_exists_and_takes_the_common_parameters(experiment):
    for paper, name in paper_notebooks(experiment):
        parameters = notebook_parameters(ROOT / f'nbs/paper/{paper}/{name}.ipynb')
        assert {'experiment', 'runs', 'out'} <= set(parameters) and all(p['help'] for p in parameters.values())


@pytest.mark.parametrize('experiment, name', [('demo', 'table_01'), ('demo', 'table_02'), ('em', 'table_05')])
def test_table_notebooks_run_on_half_finished_experiments(tmp_path, monkeypatch, experiment, name):
    monkeypatch.chdir(ROOT)
    finish(tmp_path / 'runs', experiment, 'scaleprotoseg', 'threshold', miou=.78, alive=24, active=20, total=24)
    target = tmp_path / f'figures/{experiment}/scaleprotoseg/{name}.ipynb'
    run_notebook(f'nbs/paper/scaleprotoseg/{name}.ipynb', target,
                 {'experiment': experiment, 'runs': str(tmp_path / 'runs'), 'out': str(tmp_path / 'figures')})
    table = pd.read_csv(target.with_suffix('.csv'), dtype=str)
    assert '78.00' in set(table.miou) and '—' in set(table.miou)
    assert 'commit cccccccccc;' in target.with_suffix('.md').read_text()


# the report

@pytest.fixture
def page(runs, tmp_path):
    "A report of one table, one picture and captions that try to break it."
    folder = tmp_path / 'figures/demo/scaleprotoseg'
    save_table(table_of(runs).reset_index(), folder / 'table_01', 'Accuracy <script>alert(1)</script>')
    fig = Figure(figsize=(1, 1))
    fig.subplots().plot([1, 2])
    save_figure(fig, folder / 'figure_04_car', 'Groups of "car" & <others>.')
    save_figure(fig, folder / 'figure_040', 'Of another notebook.')
    for name in ('table_01', 'figure_04'): book(folder / f'{name}.ipynb')
    return build_report('demo', tmp_path / 'figures', runs, PUBLISHED).read_text()


def test_report_needs_nothing_but_itself(page, tmp_path):
    assert page.count('src="data:image/png;base64,') == 1
    assert not re.search(r'https?:|<script|<link|@import|url\(', page)
    assert all(link.startswith('#') for link in re.findall(r'href="([^"]*)"', page))
    assert str(tmp_path) not in page and str(ROOT) not in page and str(Path.home()) + '/' not in page


def test_report_says_what_was_run_and_what_was_not(page):
    assert '<dt>Not run</dt><dd>pretrain, deeplabv2, linear</dd>' in page
    assert '2 min 0 s in total' in page and 'process 900 MB' in page
    assert '53.00' in page and 'Cityscapes val (other data)' in page and 'cccccccccc' in page
    assert 'table_02.ipynb has not been run' in page and 'A promise.' in page and 'scaleprotoseg' in page


def test_report_shows_captions_as_text_and_only_pictures_of_its_notebooks(page):
    assert 'Accuracy &lt;script&gt;' in page and 'Groups of &quot;car&quot; &amp; &lt;others&gt;.' in page
    assert 'Of another notebook' not in page


def test_report_without_runs_says_which_command_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match='scaleprotoseg reproduce --experiment demo'):
        build_report('demo', tmp_path, tmp_path / 'runs', PUBLISHED)
    assert not list(tmp_path.iterdir())
