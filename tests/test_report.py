"Tables, figures, notebooks with parameters and the report, on runs that the tests write themselves."
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
from saved import finish, finish_demo

from scaleprotoseg import report
from scaleprotoseg.contents import PAPER_NOTEBOOKS, main_experiment, main_table, paper_notebooks
from scaleprotoseg.data import Labels, Sample
from scaleprotoseg.notebooks import (NotebookFailed, check_parameters, notebook_parameters, run_cells, run_notebook, without_leftovers,
                                     without_machine_paths)
from scaleprotoseg.recipes import experiments, find_recipe, recipes_of
from scaleprotoseg.records import collect
from scaleprotoseg.report import (STEPS, ablation_table, accuracy_table, build_report, claims_runs, collect_published, compare, compared, entropy_cases, faithful,
                                  find_published, plot_comparison, published, published_recipe, published_recipes,
                                  recipe_table, save_figure, save_table, size_cases, steps_table, threshold_cases, used_runs)

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / 'data/published'
COLUMNS = ['method', 'step', 'setting', 'data', 'metric', 'value', 'std', 'source', 'note']


@pytest.fixture
def runs(tmp_path): return finish_demo(tmp_path / 'runs')


def table_of(runs, experiment='demo', name='scaleprotoseg_table_01'):
    return accuracy_table(collect(runs, experiment), experiment, published(name, PUBLISHED)).set_index('method')


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
    other, table = table[table.variant == 'split2'], table[table.variant == '']
    assert len(other) == 2 and other.difference.isna().all()    # a draw of our own is not compared
    assert table.published.tolist() == [77.97, 79.29]
    assert table.published_data.tolist() == ['EM, split 1', 'EM, split 2']
    assert table.difference.tolist() == pytest.approx([.03, -1.29]) and set(table.verdict) == verdicts


def test_the_published_program_stands_beside_its_own_numbers(tmp_path):
    assert [r.name for r in faithful('em')] == ['em-ablations/protoseg-legacy'] and faithful('em-ablations') == faithful('demo') == []
    for experiment, variant, miou in (('em', '', .78), ('em-ablations', '-legacy', .77), ('em-ablations', '-plus', .76)):
        finish(tmp_path, experiment, f'protoseg{variant}', 'prune_finetune', miou=miou, alive=18, total=20)
        finish(tmp_path, experiment, f'protoseg{variant}', 'finetune', miou=miou - .01, alive=20, total=20)
    frame = collect_published(tmp_path, 'em')
    assert set(frame.variant) == {'', 'legacy'}
    table = accuracy_table(frame, 'em', published('scaleprotoseg_table_05', PUBLISHED)).set_index(['method', 'variant']).loc['protoseg']
    assert table.loc['legacy', 'difference'].tolist() == pytest.approx([77 - 77.63, 77 - 78.92]) and table.loc['legacy', 'verdict'].tolist() == ['agrees', 'below']
    assert table.loc['', 'verdict'].tolist() == ['agrees', 'agrees'] and 'plus' not in table.index
    steps = steps_table(frame, 'em', published('scaleprotoseg_table_02', PUBLISHED)).set_index(['method', 'variant', 'stage'])
    assert steps.loc[('protoseg', 'legacy', 'prune_finetune'), ['published_step', 'miou', 'prototypes']].tolist() == ['pruned', 77, 18]
    assert 'legacy' not in set(accuracy_table(collect(tmp_path, 'em'), 'em', published('scaleprotoseg_table_05', PUBLISHED)).variant)


def test_black_boxes_with_a_crf_are_shown_and_not_judged(tmp_path):
    finish(tmp_path, 'pascal', 'deeplabv2', 'joint', miou=.734)
    row = table_of(tmp_path, 'pascal').loc['deeplabv2']
    assert row.published_data == 'Pascal VOC val, with CRF and COCO weights' and row.verdict == 'another set-up' and row.difference == pytest.approx(73.4 - 77.69)


@pytest.mark.parametrize('miou, std, verdict', [
    (69.9, None, 'agrees'), (70.1, None, 'above'), (67.9, None, 'below'), (70.1, 0.6, 'agrees')])
def test_verdict_allows_one_point_or_two_deviations(miou, std, verdict):
    row = compare({'miou': miou, 'std': std, 'runs': 3}, {'value': 69., 'std': .2}, 'Cityscapes val', same_data=True)
    assert row['verdict'] == verdict and row['difference'] == pytest.approx(miou - 69)


def test_a_method_that_only_starts_others_is_in_no_table(runs):
    assert list(table_of(runs).index) == ['deeplabv2', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view', 'prototype_view']


def test_steps_count_used_prototypes_after_grouping(runs):
    table = steps_table(collect(runs, 'demo'), 'demo', published('scaleprotoseg_table_02', PUBLISHED))
    table = table.set_index(['method', 'stage'])
    grouped, tuned = table.loc[('scaleprotoseg', 'threshold')], table.loc[('scaleprotoseg', 'finetune')]
    assert grouped.prototypes == 61 and type(grouped.prototypes) is int and grouped.published_prototypes == 111
    assert tuned.published_step == 'project' and tuned.published == 70.01
    assert tuned.miou is None and tuned.verdict == 'not run'
    assert table.loc[('protoseg', 'finetune'), 'prototypes'] == 90


@pytest.mark.parametrize('experiment, same', [('em', True), ('em-quick', True), ('em-supplement', False)])
def test_only_the_published_division_of_em_is_the_same_data(tmp_path, experiment, same):
    finish(tmp_path, experiment, 'protoseg', 'prune_finetune', miou=.78)
    row = table_of(tmp_path, experiment, 'scaleprotoseg_table_05').loc[['protoseg']].iloc[0]
    assert row.miou == 78 and (row.published is not None) == same and (row.difference is not None) == same
    assert same or row.verdict is None and not row.published_data


@pytest.mark.parametrize('experiment, verdict', [('pascal', 'agrees'), ('cocostuff', None), ('camvid', None), ('camvid-quick', None)])
def test_the_main_table_is_that_of_the_dataset(tmp_path, experiment, verdict):
    name = main_table(experiment)
    assert name == f'scaleprotoseg_table_0{6 if experiment == "cocostuff" else 1}'
    assert len(table_of(tmp_path, experiment, name)) == 6                               # without runs
    finish(tmp_path, experiment, 'scaleprotoseg', 'threshold', miou=.718)
    row = table_of(tmp_path, experiment, name).loc['scaleprotoseg']
    published = {'pascal': 71.80, 'cocostuff': 34.50}.get(experiment, 68.97)
    assert row.published == published and row.verdict == ('above' if experiment == 'cocostuff' else verdict)
    assert ('other data' in row.published_data) == experiment.startswith('camvid')


def test_steps_that_a_recipe_does_not_have_are_in_no_table(tmp_path):
    table = steps_table(collect(tmp_path, 'cocostuff'), 'cocostuff', published('scaleprotoseg_table_02', PUBLISHED))
    assert table.stage.tolist() == ['project', 'finetune', 'project', 'finetune', 'threshold']


# ablations

CASES = {'protoseg_supplement_table_01': size_cases, 'scaleprotoseg_table_07': threshold_cases, 'scaleprotoseg_table_08': entropy_cases}

def ablations_of(runs, name, experiment='pascal-ablations'):
    return ablation_table(collect(runs, experiment, with_main=True), CASES[name](experiment), published(name, PUBLISHED))


@pytest.mark.parametrize('experiment', [e for e in experiments() if e.endswith('-ablations')])
def test_ablations_are_compared_among_themselves_and_not_with_the_main_numbers(tmp_path, experiment):
    assert not main_table(experiment) and {(p, n) for p, n in paper_notebooks(experiment)}.isdisjoint(
        [('scaleprotoseg', f'table_0{i}') for i in (1, 2, 3, 5, 6)])
    assert len(compared(experiment)) == len(recipes_of(experiment)) and all(r.variant for r in compared(experiment))
    r, other = recipes_of(experiment)[0], recipes_of(experiment)[-1]
    finish(tmp_path, experiment, r.method, r.last.name, variant=r.variant, miou=.72)
    for reference in (None, published('scaleprotoseg_table_01', PUBLISHED)):
        table = accuracy_table(collect(tmp_path, experiment), experiment, reference).set_index(['method', 'variant', 'stage'])
        assert len(table) == sum(len(r.shown_stages) for r in recipes_of(experiment)) and table.published.isna().all()
        assert table.loc[(r.method, r.variant, r.last.name), 'miou'] == 72
        assert r is other or table.loc[(other.method, other.variant, other.last.name), 'verdict'] == 'not run'
    table = steps_table(collect(tmp_path, experiment), experiment, published('scaleprotoseg_table_02', PUBLISHED))
    steps = {m for m, *_ in STEPS} & {r.method for r in recipes_of(experiment)}
    assert len(table) if steps else not len(table)
    assert not steps or table.published.isna().all() and not table.duplicated(['method', 'variant', 'stage']).any()


@pytest.mark.parametrize('name', CASES)
def test_ablations_that_were_not_run_are_dashes(tmp_path, name):
    table = save_table(ablations_of(tmp_path / 'runs', name), tmp_path / 't', '')
    assert set(table[['prototypes', 'group_average', 'miou', 'std', 'difference']].values.ravel()) == {'—'}
    of_ours = table[table.setting != '—']
    assert set(of_ours.verdict) == {'not run'} and set(of_ours.runs) == {'0'}
    values = published(name, PUBLISHED).query("data == 'Pascal VOC val' and metric == 'miou'").value
    assert sorted(x for x in table.published if x != '—') == sorted(f'{v:.2f}' for v in values)       # every row of the paper


def test_the_main_row_of_sizes_comes_from_the_main_experiment(tmp_path):
    finish(tmp_path, 'pascal', 'protoseg', 'prune_finetune', miou=.715, alive=133, total=210)
    finish(tmp_path, 'pascal-ablations', 'protoseg', 'prune_finetune', variant='k4', miou=.6, alive=70, total=84)
    finish(tmp_path, 'pascal-ablations', 'protoseg', 'prune_finetune', variant='coco', miou=.9, alive=1, total=210)   # not in Table 1
    frame = collect(tmp_path, 'pascal-ablations', with_main=True)
    table = ablation_table(frame, size_cases('pascal-ablations'), published('protoseg_supplement_table_01', PUBLISHED))
    assert table.variant.tolist() == ['', 'k4', 'k20', 'k50', 'd128', 'd256', 'joint2x']
    assert table.published.tolist() == [72.05, 65.04, 72.76, 72.67, 67.13, 65.79, 71.63]
    assert table.prototypes.tolist()[:3] == [133, 70, None] and table.verdict.tolist()[:3] == ['agrees', 'below', 'not run']
    assert len(used_runs(frame, table)) == 2 and len(collect(tmp_path, 'pascal-ablations')) == 2


@pytest.mark.parametrize('dataset, published_miou', [('pascal', [72.26, 72.11, 72.12]), ('ade20k', [34.32, 34.03, 34.16]), ('cocostuff', [])])
def test_thresholds_that_were_lost_stand_beside_none_of_ours(tmp_path, dataset, published_miou):
    for stage, n in (('threshold_0.01', 140), ('threshold', 130), ('threshold_0.1', 120)):
        finish(tmp_path, f'{dataset}-ablations', 'scaleprotoseg', stage, variant='tau', miou=.72, alive=200, active=n, group_average=n / 40)
    table = ablations_of(tmp_path, 'scaleprotoseg_table_07', f'{dataset}-ablations')
    assert table.prototypes.tolist()[:3] == [140, 130, 120] and table.group_average.tolist()[:3] == [3.5, 3.25, 3.]
    assert [x for x in table.published if x] == published_miou
    if published_miou:
        assert table.published_setting.tolist() == [
            None, 'row 2, tau = 0.05', None, 'row 1 (threshold lost)', 'row 3 (threshold lost)']
        assert table.setting[3:].isna().all() and table.verdict[3:].isna().all() and table.miou[3:].isna().all()
    assert table.verdict[[0, 2]].isna().all() and table.difference[[0, 2]].isna().all()


def test_entropy_off_and_on_come_from_two_experiments(tmp_path):
    finish(tmp_path, 'ade20k', 'scaleprotoseg', 'threshold', miou=.34, alive=1800, active=1100, group_average=4.)
    finish(tmp_path, 'ade20k', 'scaleprotoseg', 'threshold', 1, miou=.35, alive=1800, active=1101, group_average=5.)
    table = ablations_of(tmp_path, 'scaleprotoseg_table_08', 'ade20k-ablations').set_index('setting')
    assert table.index.tolist() == ['entropy = 0', 'entropy = 0.25'] and table.published_setting.tolist() == table.index.tolist()
    on, off = table.loc['entropy = 0.25'], table.loc['entropy = 0']
    assert (on.prototypes, on.group_average, on.miou, on.runs, on.verdict) == (1100.5, 4.5, 34.5, 2, 'agrees')
    assert (on.published_prototypes, on.published_group_average) == (1132, 4.08)
    assert (off.published_prototypes, off.published_group_average, off.published, off.verdict) == (1405, 6.06, 33.40, 'not run')


# published numbers

def test_every_transcribed_value_is_in_a_table_of_recipes():
    rows = published_recipes(PUBLISHED)
    for dataset in rows.dataset.unique():
        table, here = recipe_table(dataset, PUBLISHED), rows[rows.dataset == dataset]
        for a, b in [('published', 'value'), *((c, c) for c in ('method', 'variant', 'stage', 'quantity', 'note'))]:
            assert table[a].tolist() == here[b].tolist()
    for row in rows[['dataset', 'method', 'variant']].drop_duplicates().itertuples(index=False):
        if not row.variant.startswith('tau_row'): find_recipe(*published_recipe(*row))


@pytest.mark.parametrize('experiment, variants', [
    ('pascal-ablations', {'sgd', 'k4', 'k20', 'k50', 'd128', 'd256', 'joint2x', 'no_diversity', 'coco', 'no_entropy', 'tau_row1', 'tau_row3'}),
    ('cocostuff-ablations', {'sgd'}), ('em-supplement', {'supplement'}), ('demo', set())])
def test_recipe_tables_of_variants(experiment, variants):
    table = recipe_table(experiment, PUBLISHED)
    assert set(table.variant) == variants
    numbers = table[~table.quantity.str.startswith('split_') & (table.published != '') & (table.ours != '—')]
    assert (numbers.ours.astype(float) == numbers.published.astype(float)).all()
    lost = table[table.variant.str.startswith('tau_row')]
    assert set(lost.ours) <= {'—'} and set(lost.published) <= {''} and set(lost.note) <= {'lost'}


def test_published_numbers_that_papers_repeat_agree():
    steps, sweep = published('scaleprotoseg_table_02', PUBLISHED), published('scaleprotoseg_table_07', PUBLISHED)
    for data in ('Cityscapes val', 'Pascal VOC val', 'ADE20K val'):
        here = find_published(steps, method='scaleprotoseg', step='grouped', data=data)
        there = find_published(sweep, data=data, setting='row 2, tau = 0.05')
        assert (here['value'], here.get('std')) == (there['value'], there.get('std'))
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
    assert files == ['f.pdf', 'f.png', 't.csv', 't.md', 't.tex']              # and no temporary file
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
    prediction[0, 0] = 0                                                                 # the same as the truth, but where that is void
    label[1:] = 1
    fig = plot_comparison([Sample(torch.zeros(3, 4, 6), label, 'x')], {'one': [prediction]}, labels)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['b']                   # what is seen
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
    for refuse in (check_parameters, run_cells):
        with pytest.raises(ValueError, match='tagged `parameters`'): refuse(tmp_path / 'a.ipynb', {})
    (tmp_path / 'c.ipynb').write_text('{')
    with pytest.raises(ValueError, match='c.ipynb is damaged'): check_parameters(tmp_path / 'c.ipynb', {})
    with pytest.raises(FileNotFoundError, match='no notebook'): check_parameters(tmp_path / 'd.ipynb', {})


def test_a_parameter_without_a_type_takes_any_value(tmp_path):
    v4 = nbformat.v4
    cells = [v4.new_code_cell('free = 3', metadata={'tags': ['parameters']}), v4.new_code_cell(f'open({str(tmp_path / "said")!r}, "w").write(str(free))')]
    (tmp_path / 'a.ipynb').write_text(nbformat.writes(v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})))
    check_parameters(tmp_path / 'a.ipynb', {'free': 'x'})
    run_cells(tmp_path / 'a.ipynb', {'free': 'x'})
    assert (tmp_path / 'said').read_text() == 'x'


def test_claims_of_an_experiment_with_nothing_to_compare_rest_on_no_run(runs):
    assert len(claims_runs(collect(runs, 'smoke'), [])) == 0


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


def test_the_folder_of_the_data_is_not_in_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = book(tmp_path / 'a.ipynb', 'print(name)')
    text = run_notebook(source, tmp_path / 'b.ipynb', {'name': '/archive/of/somebody/data'}).read_text()
    assert '/archive' not in text and '…/data' in text


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

@pytest.mark.parametrize('notebook', PAPER_NOTEBOOKS, ids=lambda n: f'{n.paper}-{n.name}')
def test_every_notebook_exists_and_takes_the_common_parameters(notebook):
    parameters = notebook_parameters(ROOT / f'nbs/paper/{notebook.paper}/{notebook.name}.ipynb')
    assert {'experiment', 'runs', 'out'} <= set(parameters) and all(p['help'] for p in parameters.values())
    default = parameters['experiment']['default'].strip("\"'")
    assert (notebook.paper, notebook.name) in paper_notebooks(default)


def test_every_experiment_has_notebooks():
    assert [e for e in experiments() if not paper_notebooks(e)] in ([], ['em-ablations'])     # no published table is about that


@pytest.mark.parametrize('notebook', PAPER_NOTEBOOKS, ids=lambda n: f'{n.paper}-{n.name}')
def test_notebooks_without_runs_show_dashes_or_say_what_is_missing(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    listing = [e for e in experiments() if (notebook.paper, notebook.name) in paper_notebooks(e)]
    assert listing
    for experiment in listing:
        said = ''
        try: run_cells(f'nbs/paper/{notebook.paper}/{notebook.name}.ipynb',
                       {'experiment': experiment, 'runs': str(tmp_path / 'runs'), 'out': str(tmp_path)})
        except NotebookFailed as e: said = str(e)
        saved = tmp_path / f'{experiment}/{notebook.paper}/{notebook.name}.csv'
        if saved.exists():
            table = pd.read_csv(saved, dtype=str)
            assert set(table['miou' if 'miou' in table else 'value']) == {'—'} and 'No finished run.' in saved.with_suffix('.md').read_text()
        else: assert re.search(f'no finished .*{main_experiment(experiment)}.* seed 0', said + capsys.readouterr().out)


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
    assert page.count('src="data:image/webp;base64,') == 1
    assert not re.search(r'https?:|<script|<link|@import|url\(', page)
    links = re.findall(r'href="([^"]*)"', page)
    assert all(re.fullmatch(r'#[\w-]+|\w+/\w+\.ipynb', link) for link in links)       # inside the page, or a notebook beside it
    assert all(f'id="{link[1:]}"' in page for link in links if link.startswith('#'))
    assert str(tmp_path) not in page and str(ROOT) not in page and str(Path.home()) + '/' not in page


def test_report_says_what_was_run_and_what_was_not(page):
    assert '<dt>Not run</dt><dd>pretrain, deeplabv2, linear, prototype_view, prototype_view-k1, scaleprotoseg-no_entropy, scaleprotoseg-tau' in page
    assert '2 min 30 s in total' in page and 'process 900 MB' in page
    assert '53.00' in page and 'Cityscapes val (other data)' in page and 'cccccccccc' in page
    assert 'table_02.ipynb has not been run' in page and 'A promise.' in page and 'scaleprotoseg' in page


def test_report_shows_captions_as_text_and_only_pictures_of_its_notebooks(page):
    assert 'Accuracy &lt;script&gt;' in page and 'Groups of &quot;car&quot; &amp; &lt;others&gt;.' in page
    assert 'Of another notebook' not in page


@pytest.mark.parametrize('experiment, method, variant, stage', [
    ('pascal-ablations', 'scaleprotoseg', 'tau', 'threshold'), ('em-supplement', 'protoseg', '', 'prune_finetune'),
    ('em-ablations', 'protoseg', 'legacy', 'prune_finetune'),
    ('cocostuff', 'scaleprotoseg', '', 'threshold'), ('camvid-quick', 'scaleprotoseg', '', 'threshold')])
def test_every_kind_of_experiment_has_a_report(tmp_path, experiment, method, variant, stage):
    finish(tmp_path / 'runs', experiment, method, stage, variant=variant, miou=.612, alive=5, active=5, total=5)
    page = build_report(experiment, tmp_path, tmp_path / 'runs', PUBLISHED).read_text()
    summary = page[:page.index('<nav>')]
    assert '61.20' in summary and ('ScaleProtoSeg, Table' in summary) == bool(main_table(experiment))
    assert ('<th>published</th>' in summary) == bool(main_table(experiment)) and ('<th>variant</th>' in summary) == bool(variant)


def test_report_without_runs_says_which_command_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match='scaleprotoseg reproduce --experiment demo'):
        build_report('demo', tmp_path, tmp_path / 'runs', PUBLISHED)
    assert not list(tmp_path.iterdir())


def test_pictures_of_an_earlier_run_do_not_stand_beside_new_tables(tmp_path, capsys):
    def save(*names):
        for name in names: save_figure(Figure(), tmp_path / name)
    save('figure_04_a', 'figure_04_b', 'figure_041')
    (tmp_path / 'figure_04.ipynb').write_text('{}')
    with without_leftovers(tmp_path, 'figure_04'): save('figure_04_b', 'figure_04_c')
    assert 'figure_04_a' in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob('*.png')} == {'figure_04_b.png', 'figure_04_c.png', 'figure_041.png'} and (tmp_path / 'figure_04.ipynb').is_file()
    with pytest.raises(RuntimeError), without_leftovers(tmp_path, 'figure_04'): raise RuntimeError('failed')
    assert (tmp_path / 'figure_04_c.pdf').is_file()                                    # nothing is lost by a failure


def test_a_table_without_runs_does_not_replace_one_that_has_some(tmp_path):
    import pandas as pd
    table = lambda *runs: pd.DataFrame({'method': list('abc')[:len(runs)], 'runs': runs}, dtype=object)
    save_table(table(0, 0), tmp_path / 't', 'first')
    save_table(table(3, 0), tmp_path / 't', 'some')
    save_table(table(0, 2), tmp_path / 't', 'others')
    before = (tmp_path / 't.csv').read_bytes()
    for empty in (table(0, 0), table()):
        with pytest.raises(FileNotFoundError, match=r't\.csv is kept'): save_table(empty, tmp_path / 't', 'none')
    assert (tmp_path / 't.csv').read_bytes() == before
