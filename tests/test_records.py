"What was run, what is recorded, and whether it came out again."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from saved import finish, finish_demo

from scaleprotoseg import recipes
from scaleprotoseg.measures import held_out, held_out_claims
from scaleprotoseg.recipes import changed, experiments, find_recipe
from scaleprotoseg.records import collect, finished, metrics_digest, read_record, record, verified, verify
from scaleprotoseg.report import build_report, claims, claims_table, distinct, provenance_text, save_again

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / 'data/published'
RECORDED = sorted((ROOT / 'data/recorded').glob('*.json'))
LATER = '2031-01-01T00:00:00+00:00'


@pytest.fixture
def runs(tmp_path): return finish_demo(tmp_path / 'runs')


@pytest.fixture
def records(runs, tmp_path):
    record(runs, 'demo', tmp_path / 'recorded')
    return tmp_path / 'recorded'


def change(folder, file='provenance.json', **facts):
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **facts}))


def change_run(folder, **facts):
    change(folder, **facts)
    return folder


def hold_out(folder, **facts):
    "Scores on held-out images, of the stage's present results."
    change(folder, 'held_out.json', **{'split': 'test', 'images': 3, 'data': 'd', 'miou': .4, 'accuracy': .5, 'iou': {'a': .4, 'b': None},
                                       'commit': 'c0ffee', 'metrics': metrics_digest(folder), **facts})


# what was run

def test_collect_has_a_row_per_finished_stage_and_seed(runs):
    (runs / 'demo/protoseg/seed0/project').mkdir()                  # begun, not finished
    (runs / 'demo/protoseg/seed0/other').mkdir()                    # not a stage
    frame = collect(runs, 'demo')
    assert list(zip(frame.method, frame.stage, frame.seed)) == [
        ('protoseg', 'finetune', 0), ('protoseg', 'prune_finetune', 0), *(('scaleprotoseg', 'threshold', s) for s in range(3))]
    assert frame.accuracy.unique().tolist() == [75.] and frame.seconds.sum() == 150 and not frame.recorded.any()


def test_collect_works_from_metrics_alone(tmp_path):
    finish(tmp_path, 'demo', 'linear', 'joint', provenance=False)
    frame = collect(tmp_path, 'demo')
    assert len(frame) == 1 and frame.commit.isna().all() and 'seed 0' in provenance_text(frame)


def test_a_stage_that_variants_share_is_counted_once(tmp_path):
    for variant, stages in {'': ('joint', 'group_joint'), 'no_entropy': ('joint', 'group_joint')}.items():
        for stage in stages: finish(tmp_path, 'demo', 'scaleprotoseg', stage, variant=variant)
    finish(tmp_path, 'demo', 'scaleprotoseg', 'joint', seed=1)
    finish(tmp_path, 'demo', 'linear', 'joint', provenance=False)
    finish(tmp_path, 'demo', 'deeplabv2', 'joint', provenance=False)
    frame = collect(tmp_path, 'demo')
    assert len(frame) == 7 and '2 min 0 s of computing' in provenance_text(frame)       # 4 trainings, 2 of unknown duration
    assert len(distinct(frame)) == 6
    page = build_report('demo', tmp_path / 'figures', tmp_path, PUBLISHED).read_text()
    assert '6 finished, 2 min 0 s in total' in page


def test_collect_leaves_out_what_another_recipe_made(runs):
    for stage in ('finetune', 'prune_finetune'): (runs / f'demo/protoseg/seed0/{stage}/recipe.json').write_text('"0123456789ab"')
    with pytest.warns(UserWarning, match='0123456789ab'): frame = collect(runs, 'demo')
    assert 'protoseg' not in set(frame.method)


def test_collect_suggests_the_experiment(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'demo'"): collect(tmp_path, 'dema')


# what is recorded

def test_a_record_gives_the_rows_of_the_runs(runs, records, tmp_path):
    ours, theirs = collect(runs, 'demo'), collect(tmp_path / 'nothing', 'demo', recorded=records)
    assert theirs.recorded.all()
    pd.testing.assert_frame_equal(ours.drop(columns='recorded'), theirs.drop(columns='recorded'))
    assert len(collect(tmp_path / 'nothing', 'demo')) == 0                             # never unless asked for


def test_what_was_run_here_comes_before_what_is_recorded_and_a_run_is_one_training(records, tmp_path):
    finish(tmp_path / 'mine', 'demo', 'protoseg', 'finetune', 0, .60, finished=LATER)  # no prune_finetune yet: nothing recorded takes its place
    finish(tmp_path / 'mine', 'demo', 'protoseg', 'finetune', 7, .61, finished=LATER)
    frame = collect(tmp_path / 'mine', 'demo', recorded=records)
    mine = frame[~frame.recorded]
    assert list(zip(frame.stage, frame.seed)) == [('finetune', 0), ('finetune', 7), *(('threshold', s) for s in range(3))]
    assert list(zip(mine.seed, mine.miou)) == [(0, 60.), (7, 61.)]
    assert '3 of 5 as recorded' in provenance_text(frame) and 'recorded' not in provenance_text(mine)


def test_what_is_recorded_of_other_images_does_not_stand_in(tmp_path):
    val = find_recipe('em-quick', 'unet').data.splits['val']
    of = lambda contents: {'val': {'dataset': 'em', 'images': 10, 'contents': contents}}
    change(finish(tmp_path / 'theirs', 'em-quick', 'unet', 'joint', 0, .7), data=of('a'))
    change(finish(tmp_path / 'theirs', 'em-quick', 'unet', 'joint', 0, .7, variant='split2'), data=of('b'))
    record(tmp_path / 'theirs', 'em-quick', tmp_path / 'recorded')
    folder = finish(tmp_path / 'mine', 'em-quick-ablations', 'unet', 'joint', 0, .8, variant='no_zoom')
    assert find_recipe('em-quick-ablations', 'unet', 'no_zoom').data.splits['val'] == val
    change(folder, data=of('a'))
    assert len(collect(tmp_path / 'mine', 'em-quick-ablations', True, tmp_path / 'recorded')) == 3
    change(folder, data=of('c'))
    with pytest.warns(UserWarning, match='1 recorded stages left out: they are of other images'): frame = collect(tmp_path / 'mine', 'em-quick-ablations', True, tmp_path / 'recorded')
    assert frame.variant.tolist() == ['split2', 'no_zoom']      # another division of the images is another split


@pytest.mark.parametrize('place', ['nowhere', 'recorded/demo.json'])
def test_records_that_are_asked_for_must_be_there(records, tmp_path, place):
    with pytest.raises(FileNotFoundError, match=f'{place} is no folder of records'): collect(tmp_path, 'demo', recorded=tmp_path / place)
    assert len(collect(tmp_path / 'runs', 'em-quick', recorded=records)) == 0           # an experiment without a record is none


def test_a_record_only_grows(runs, records, tmp_path):
    before = (records / 'demo.json').read_text()
    assert record(runs, 'demo', records) == []
    finish(runs, 'demo', 'protoseg', 'finetune', 0, .90, finished=LATER)               # run again, with another result
    assert record(runs, 'demo', records) == [] and (records / 'demo.json').read_text() == before
    finish(runs, 'demo', 'protoseg', 'finetune', 1, .90)
    assert record(runs, 'demo', records) == ['protoseg/seed1/finetune']
    after = json.loads((records / 'demo.json').read_text())
    assert {k: v for k, v in after.items() if k != 'protoseg/seed1/finetune'} == json.loads(before)
    assert [k for k in after if k.startswith('protoseg')] == ['protoseg/seed0/finetune', 'protoseg/seed0/prune_finetune', 'protoseg/seed1/finetune']


def test_one_machine_does_not_drop_what_another_recorded(records, tmp_path):
    finish(tmp_path / 'mine', 'demo', 'deeplabv2', 'joint', 0, .60)
    assert record(tmp_path / 'mine', 'demo', records) == ['deeplabv2/seed0/joint']
    assert len(read_record('demo', records)) == 6


def test_held_out_scores_that_come_later_are_added_to_the_same_result_only(runs, records):
    before = read_record('demo', records)['protoseg/seed0/finetune'].facts
    hold_out(change_run(runs / 'demo/protoseg/seed0/finetune', finished=LATER, device='cpu other, threads: 1'))      # another run with the same scores
    change(runs / 'demo/protoseg/seed0/prune_finetune', 'metrics.json', miou=.481)
    hold_out(runs / 'demo/protoseg/seed0/prune_finetune')
    hold_out(runs / 'demo/scaleprotoseg/seed0/threshold', metrics='of a run before')
    assert record(runs, 'demo', records) == ['protoseg/seed0/finetune']
    facts = read_record('demo', records)['protoseg/seed0/finetune'].facts
    assert facts['held_out']['miou'] == .4 and {k: v for k, v in facts.items() if k != 'held_out'} == before


def test_the_record_of_another_recipe_is_left_out_and_leaves_with_the_next(runs, records):
    text = (records / 'demo.json').read_text()
    (records / 'demo.json').write_text(text.replace(find_recipe('demo', 'protoseg').digest('finetune'), '0123456789ab'))
    with pytest.warns(UserWarning, match='1 of 5 lines'): known = read_record('demo', records)
    assert set(known) == {'protoseg/seed0/prune_finetune', *(f'scaleprotoseg/seed{s}/threshold' for s in range(3))}
    with pytest.warns(UserWarning, match='1 of 5 lines'): new = record(runs, 'demo', records)
    assert new == ['protoseg/seed0/finetune'] and (records / 'demo.json').read_text() == text


def test_lines_of_recipes_that_are_not_known_here_stay(runs, records):
    lines = json.loads((records / 'demo.json').read_text())
    (records / 'demo.json').write_text(json.dumps(lines | {'protoseg-somebodys/seed0/joint': lines['protoseg/seed0/finetune']}))
    finish(runs, 'demo', 'linear', 'joint')
    assert record(runs, 'demo', records) == ['linear/seed0/joint'] and len(read_record('demo', records)) == 6
    assert list(json.loads((records / 'demo.json').read_text()))[-1] == 'protoseg-somebodys/seed0/joint'


@pytest.mark.parametrize('facts', [{'commit': 'unknown'}, {'commit': 'c0ffee-dirty'}, {'commit': ''}, {'commit': None}, {'recipe': None}, {'recipe': '0123456789ab'}])
def test_a_number_that_nobody_could_trace_is_not_recorded(runs, records, facts):
    before = (records / 'demo.json').read_text()
    change(finish(runs, 'demo', 'linear', 'joint'), **facts)
    with pytest.raises(ValueError, match='nothing was recorded: linear/seed0/joint '): record(runs, 'demo', records)
    assert (records / 'demo.json').read_text() == before


def test_nor_are_held_out_scores_of_unknown_code(runs, records):
    hold_out(runs / 'demo/protoseg/seed0/finetune', commit='unknown')
    with pytest.raises(ValueError, match='protoseg/seed0/finetune was made by code that is in no commit'): record(runs, 'demo', records)


@pytest.mark.parametrize('text', ['{', '[]', '{"protoseg": {}}', '{"protoseg/seedx/joint": {"recipe": "a", "metrics": {"miou": 0.5}}}', '{"protoseg/seed0/joint": {"recipe": "a"}}',
                                  '{"protoseg/seed0/joint": {"recipe": "a", "metrics": {"miou": null}}}', 'null'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / 'demo.json').write_text(text)
    with pytest.raises(ValueError, match=r'demo\.json.*record'): read_record('demo', tmp_path)


def test_ablations_stand_beside_recorded_main_runs(tmp_path):
    for seed in range(2): finish(tmp_path / 'theirs', 'em-quick', 'scaleprotoseg', 'threshold', seed, .70 + seed / 100, alive=24, active=20, total=24)
    record(tmp_path / 'theirs', 'em-quick', tmp_path / 'recorded')
    for seed in range(2): finish(tmp_path / 'mine', 'em-quick-ablations', 'scaleprotoseg', 'threshold', seed, .73, variant='k1', alive=8, active=8, total=8)
    asked = [c for c in claims('em-quick-ablations') if c.this.recipe.variant == 'k1']
    alone, both = (claims_table(collect(tmp_path / 'mine', 'em-quick-ablations', with_main=True, recorded=x), asked) for x in ('', tmp_path / 'recorded'))
    assert alone.pairs.tolist() == [0] and both.pairs.tolist() == [2] and both.difference.tolist() == pytest.approx([2.5])
    assert alone.ci95.tolist() == [None] and both.ci95.tolist() == pytest.approx([12.706 * .5], abs=1e-3) and (alone.clear[0], both.clear[0]) == (None, 'no')      # of 3 and 2, by the table of Student's t
    for seed in range(2): finish(tmp_path / 'mine', 'em-quick-ablations', 'scaleprotoseg', 'threshold', seed, .73 + seed / 100, variant='k5', alive=40, active=20, total=40)
    alike = claims_table(collect(tmp_path / 'mine', 'em-quick-ablations', with_main=True, recorded=tmp_path / 'recorded'), [c for c in claims('em-quick-ablations') if c.this.recipe.variant == 'k5'])
    assert alike.ci95[0] == pytest.approx(0) and alike.clear[0] == 'yes'


def test_a_variant_of_ones_own_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, 'RECIPES', dict(recipes.RECIPES))
    main = find_recipe('em-quick', 'unet')
    recipes.add_recipes(replace(changed(main, 'mine', steps=400), experiment='em-quick-ablations'))
    change(finish(tmp_path, 'em-quick-ablations', 'unet', 'joint', 0, .77, variant='mine'), data={})
    asked = [c for c in claims('em-quick-ablations') if c.question == 'What does mine change?']
    table = claims_table(collect(tmp_path, 'em-quick-ablations', with_main=True, recorded=ROOT / 'data/recorded'), asked)
    assert table.pairs.tolist() == [1] and table.against.tolist() == ['U-Net'] and 0 < table.difference[0] < 2
    assert not [c for c in claims('em-ablations') if c.this.recipe.variant == 'tau']         # it ends as the main recipe does


def test_recorded_held_out_scores_are_used_and_missing_ones_said(tmp_path, capsys):
    for stage in ('threshold', 'finetune'): finish(tmp_path / 'runs', 'demo', 'scaleprotoseg', stage, alive=100, active=60, total=120)
    hold_out(tmp_path / 'runs/demo/scaleprotoseg/seed0/threshold')
    record(tmp_path / 'runs', 'demo', tmp_path / 'recorded')
    frame = collect(tmp_path / 'none', 'demo', recorded=tmp_path / 'recorded')
    found, classes = held_out(tmp_path / 'none', frame, held_out_claims('demo'), recorded=tmp_path / 'recorded')
    assert found.miou.tolist() == [40.] and found.val_miou.tolist() == [50.] and classes.iou.tolist() == pytest.approx([40., float('nan')], nan_ok=True)
    assert 'scaleprotoseg seed 0 finetune is not measured' in capsys.readouterr().out
    with pytest.raises(ValueError, match='say in `recorded` where'): held_out(tmp_path / 'none', frame, held_out_claims('demo'))


def test_a_report_may_rest_on_records(records, tmp_path):
    finish(tmp_path / 'mine', 'demo', 'deeplabv2', 'joint', 0, .60)
    page = build_report('demo', tmp_path / 'figures', tmp_path / 'mine', PUBLISHED, records).read_text()
    assert '53.00' in page and '60.00' in page and '5 of 6 as recorded' in page
    stages = json.loads((tmp_path / 'figures/demo/provenance.json').read_text())
    assert len(stages) == 6 and [k for k, v in stages.items() if not v.get('recorded')] == ['deeplabv2/seed0/joint']


# did it come out again?

def test_verdicts(records, tmp_path):
    mine, how = tmp_path / 'mine', dict(finished=LATER)
    counts = dict(alive=100, total=120)
    finish(mine, 'demo', 'scaleprotoseg', 'threshold', 0, .50, **how, **counts, active=60)           # to the last digit
    change(finish(mine, 'demo', 'scaleprotoseg', 'threshold', 1, .52, **how, **counts, active=62), device='cpu other, threads: 1', versions={'torch': '9.9'})
    finish(mine, 'demo', 'scaleprotoseg', 'threshold', 2, .51, **how, **counts, active=62)           # deviation of recorded seeds: 3.6
    change(finish(mine, 'demo', 'protoseg', 'finetune', 0, .48, **how, alive=90, total=100), data={'val': {'dataset': 'partscapes', 'images': 5}})
    finish(mine, 'demo', 'protoseg', 'prune_finetune', 0, .48, alive=90, total=100)                  # copied
    finish(mine, 'demo', 'linear', 'joint', 0)                                                       # not recorded
    table = verify(mine, 'demo', records)
    assert dict(zip(zip(table.stage, table.seed), table.verdict)) == {
        ('threshold', 0): 'same', ('threshold', 1): 'close', ('threshold', 2): 'like another seed', ('finetune', 0): 'other images', ('prune_finetune', 0): 'itself'}
    assert table.set_index('seed').loc[1].unlike == 'device cpu other, threads: 1, was cpu, 2 threads; torch 9.9, was unknown'
    finish(mine, 'demo', 'scaleprotoseg', 'threshold', 2, .49, **how, **counts, active=62)
    assert verify(mine, 'demo', records).set_index('seed').loc[2].verdict == 'differs'
    assert '5 recorded stages: 1 the same' in verified(verify(mine, 'demo', records))
    assert verified(verify(tmp_path / 'none', 'demo', records)) == ''
    for path in mine.glob('demo/*/*/*/provenance.json'): path.unlink()                             # nothing is known but the scores
    assert verify(mine, 'demo', records).verdict.tolist() == ['same', 'same', 'same', 'close', 'differs']


def test_tables_of_a_second_set_of_runs(tmp_path):
    mine, counts = tmp_path / 'mine', dict(alive=24, active=20, total=24)
    scores = {('scaleprotoseg', 'threshold'): ((.70, .72), (.71, .71, .74)), ('unet', 'joint'): ((.71, .72), (.70, .73, .73))}
    for (method, stage), (theirs, ours) in scores.items():
        for seed, miou in enumerate(theirs): finish(tmp_path / 'theirs', 'em-quick', method, stage, seed, miou, **counts)
        for seed, miou in enumerate(ours): finish(mine, 'em-quick', method, stage, seed, miou, finished=LATER, **counts)
    for method, stage in scores: finish(tmp_path / 'theirs', 'em-quick', method, stage, 3, .9, **counts)            # a seed without a second run
    record(tmp_path / 'theirs', 'em-quick', tmp_path / 'recorded')
    save_again('em-quick', tmp_path / 'again', mine, tmp_path / 'recorded')
    assert pd.read_csv(tmp_path / 'again.csv').seed.tolist() == [0, 1, 0, 1]
    methods, asked = (pd.read_csv(tmp_path / f'again_{name}.csv', na_values='—') for name in ('methods', 'claims'))
    assert methods.method.tolist() == ['unet', 'scaleprotoseg'] and methods.runs.tolist() == [2, 2]
    assert methods.recorded_miou.tolist() == [71.5, 71.] and methods.miou.tolist() == [71.5, 71.] and methods.apart.tolist() == [1., 1.]
    cost = asked[asked.question == 'What does interpretability cost?'].iloc[0]
    assert len(asked) == 1 and (cost.recorded_pairs, cost.pairs) == (2, 2)      # seeds that are recorded
    assert (cost.recorded_difference, cost.difference) == (-.5, -.5) and (cost.recorded_std, cost['std']) == (.71, 2.12)
    made = json.loads((tmp_path / 'again.json').read_text())
    assert set(made) == {f'{m}/seed{s}/{stage}' for m, stage in scores for s in (0, 1)} and all(x['finished'] == LATER for x in made.values())
    with pytest.raises(ValueError, match='second run'): save_again('em-quick', tmp_path / 'itself', tmp_path / 'theirs', tmp_path / 'recorded')
    change(mine / 'em-quick/unet/seed0/joint', data={'val': {'dataset': 'em', 'images': 3}})         # other images are no second set either
    change(tmp_path / 'theirs/em-quick/unet/seed0/joint', data={'val': {'dataset': 'em', 'images': 4}})
    record(tmp_path / 'theirs', 'em-quick', tmp_path / 'other')
    save_again('em-quick', tmp_path / 'again', mine, tmp_path / 'other')
    assert pd.read_csv(tmp_path / 'again_claims.csv').pairs.tolist() == [1] and not (tmp_path / 'itself.csv').exists()


def test_the_command_says_it_and_ends_accordingly(records, tmp_path):
    def call(*more):
        return subprocess.run([sys.executable, '-m', 'scaleprotoseg', *more], capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    mine, where = tmp_path / 'mine', ('--runs', str(tmp_path / 'mine'), '--recorded', str(records))
    nothing = call('verify', 'demo', *where)
    assert nothing.returncode == 2 and 'no finished stage of demo' in nothing.stderr
    finish(mine, 'demo', 'protoseg', 'finetune', 0, .48, finished=LATER, alive=90, total=100)
    same = call('verify', 'demo', *where)
    assert same.returncode == 0 and '1 recorded stage: 1 the same' in same.stdout and 'Otherwise' not in same.stdout
    change(mine / 'demo/protoseg/seed0/finetune', versions={'torch': '9.9'})
    assert call('verify', 'demo', *where).stdout.endswith('Otherwise than when recorded: torch 9.9, was unknown\n')
    change(mine / 'demo/protoseg/seed0/finetune', 'metrics.json', miou=.2)
    differs = call('verify', 'demo', *where)
    assert differs.returncode == 1 and 'differs' in differs.stdout and '-28.00' in differs.stdout
    finish(mine, 'demo', 'linear', 'joint')
    assert call('record', 'demo', *where).stdout == 'linear/seed0/joint\n'
    absent = call('record', 'demo', '--runs', 'nowhere', '--recorded', str(records))
    assert absent.returncode == 2 and 'no runs of demo in nowhere' in absent.stderr
    ending = call('verify', 'demo', *where, '--output', str(tmp_path / 'again.csv'))
    assert ending.returncode == 2 and 'leave out .csv' in ending.stderr and not list(tmp_path.glob('again*'))


# what comes with the package

@pytest.mark.parametrize('path', RECORDED, ids=lambda p: p.stem)
def test_records_are_of_todays_recipes_and_can_be_traced(path):
    assert path.stem in experiments()
    lines, known = json.loads(path.read_text()), read_record(path.stem, path.parent)
    assert set(lines) == set(known) and len(known) > 0
    for f in known.values():
        assert {'command', 'commit', 'recipe', 'seed', 'data', 'device', 'versions', 'finished', 'seconds'} <= f.facts.keys()
        assert f.facts['seed'] == f.seed and 0 < f.facts['metrics']['miou'] <= 1 and f'--seed {f.seed}' in f.facts['command']


def test_there_are_records():
    assert {'demo', 'em-quick', 'camvid-quick'} <= {p.stem for p in RECORDED}
    assert len(finished('nowhere', 'demo', recorded=ROOT / 'data/recorded')) > 20


def test_a_result_of_several_commits_is_recorded_if_each_is_known(tmp_path):
    folder = change_run(finish(tmp_path / 'runs', 'demo', 'protoseg', 'finetune', 0, .6), commit='c0ffee; then badca5e')
    assert record(tmp_path / 'runs', 'demo', tmp_path / 'recorded') == ['protoseg/seed0/finetune']
    assert 'commits badca5e, c0ffee' in provenance_text(collect(tmp_path / 'runs', 'demo')).replace('c0ffee, badca5e', 'badca5e, c0ffee')
    change(folder, commit='c0ffee; then unknown')
    with pytest.raises(ValueError, match='in no commit .unknown.'): record(tmp_path / 'runs', 'demo', tmp_path / 'others')


def test_an_experiment_without_protoseg_has_claims_too(monkeypatch):
    monkeypatch.setattr(recipes, 'RECIPES', dict(recipes.RECIPES))
    recipes.add_recipes(*(replace(find_recipe('em-quick', m), experiment='own') for m in ('unet', 'scaleprotoseg')),
                        replace(changed(find_recipe('em-quick', 'protoseg'), 'legacy', legacy_labels=True), experiment='own'))
    assert [c.question for c in claims('own')] == ['What does interpretability cost?', 'What do groups cost?']
