"A person's veto: its name, its recipe, what it removes, and what training after it leaves alone."
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprotoseg import recipes, training
from scaleprotoseg.data import open_dataset, rng
from scaleprotoseg.failures import BlameCount, count_blame, drawn_at_random, most_blamed
from scaleprotoseg.model import load_model, read_config, read_tensors
from scaleprotoseg.predict import last_stage
from scaleprotoseg.recipes import RECIPES, Stage, Train, chosen, find_recipe, named_recipe, read_veto, veto_name, vetoed
from scaleprotoseg.training import run_method, run_stage

few = settings(max_examples=60, deadline=None)
MAIN = find_recipe('smoke', 'scaleprotoseg')
keys = st.tuples(st.integers(0, 12), st.integers(0, 200), st.integers(0, 60))


# -- names ------------------------------------------------------------------------------------------------------------

@few
@given(st.lists(keys))
def test_a_name_says_which_prototypes_and_is_read_back(prototypes):
    assert read_veto(veto_name(prototypes)) == tuple(prototypes)


def test_names_are_short_and_count_from_zero():
    assert veto_name([(1, 3, 0), (2, 10, 1)]) == 'veto-s1c3k0+s2c10k1'
    assert read_veto('veto-s1c3k0+s2c10k1') == ((1, 3, 0), (2, 10, 1))


@pytest.mark.parametrize('name', ['', 'veto', 'veto-', 'veto-3', 'tau', 'no_entropy', 'veto-s1c3', 'veto-s1c3k0+', 'veto-s1c3k0-s1c3k1',
                                  'xveto-s1c3k0', 'veto-s1c3k0 ', 'veto-s-1c3k0', 'veto-c3s1k0', 'Veto-s1c3k0', 'veto-s1c3k0+s1c3'])
def test_any_other_name_is_no_list_of_prototypes(name):
    assert read_veto(name) == ()


@few
@given(st.text(alphabet='veto-sck+0123456789', max_size=30))
def test_what_is_read_is_written_again_in_the_same_numbers(name):
    found = read_veto(name)
    assert not found or read_veto(veto_name(found)) == found


# -- recipes ----------------------------------------------------------------------------------------------------------

def line(recipe): return [(s.name, s.parent) for s in recipe.stages]


def test_a_veto_stands_between_projection_and_what_follows():
    assert line(find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0')) == [
        ('warmup', None), ('joint', 'warmup'), ('project', 'joint'), ('veto', 'project'),
        ('group_warmup', 'veto'), ('group_joint', 'group_warmup'), ('threshold', 'group_joint')]
    assert line(find_recipe('smoke', 'protoseg', 'veto-s0c3k0'))[2:] == [
        ('project', 'joint'), ('veto', 'project'), ('finetune', 'veto'), ('prune', 'finetune'), ('prune_finetune', 'prune')]


def test_everything_but_the_veto_is_the_main_recipe():
    recipe = find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0')
    for stage in recipe.stages:
        if stage.name == 'veto': assert stage == Stage('veto', 'veto', 'project', veto=((0, 3, 0),))
        else: assert replace(stage, parent=MAIN.stage(stage.name).parent) == MAIN.stage(stage.name)
    assert replace(recipe, stages=MAIN.stages, variant='') == MAIN


def test_order_and_repetition_of_the_list_make_no_other_recipe():
    a, b = (find_recipe('smoke', 'scaleprotoseg', f'veto-{x}') for x in ('s1c0k2+s0c3k0', 's0c3k0+s1c0k2+s0c3k0'))
    assert a == b and a.variant == 'veto-s0c3k0+s1c0k2' and a.stage('veto').veto == ((0, 3, 0), (1, 0, 2))
    assert find_recipe('smoke', 'scaleprotoseg', a.variant) == a


def test_a_veto_by_failures_has_a_name_and_a_number():
    recipe = find_recipe('smoke', 'scaleprotoseg', 'veto')
    assert recipe is RECIPES['smoke/scaleprotoseg-veto'] and recipe == vetoed(MAIN, blamed=3)
    assert (recipe.stage('veto').blamed, recipe.stage('veto').veto) == (3, ())
    assert line(recipe) == line(find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0'))
    assert vetoed(MAIN, blamed=5, variant='veto5').name == 'smoke/scaleprotoseg-veto5'


def test_the_control_has_a_name_of_its_own_and_needs_a_number():
    recipe = vetoed(MAIN, blamed=3, drawn=True)
    assert recipe.variant == 'veto_random' and recipe.judged() is MAIN and recipe.digest('veto') != vetoed(MAIN, blamed=3).digest('veto')
    assert '| veto | project | – | – | – | 3 random prototypes |' in recipe.table() and recipe.values()['veto', 'drawn'] == 1
    assert 'drawn' not in chosen(vetoed(MAIN, blamed=3).stage('veto'))                   # digests from before it existed are valid
    assert 'demo-full/scaleprotoseg-veto_random' in RECIPES
    with pytest.raises(ValueError, match='drawn=True needs how many'): Stage('x', 'veto', veto=((0, 0, 0),), drawn=True)


def test_only_stages_after_a_veto_by_failures_are_judged():
    recipe = find_recipe('smoke', 'scaleprotoseg', 'veto')
    assert [recipe.judged(s.name) for s in recipe.stages] == [None] * 3 + [MAIN] * 4 and recipe.judged() is MAIN
    by_name = find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0')
    assert not any(r.judged(s.name) for r in (MAIN, by_name) for s in r.stages)


def test_tables_and_values_say_what_is_removed():
    by_failures, by_name = find_recipe('smoke', 'scaleprotoseg', 'veto'), find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0')
    assert '| veto | project | – | – | – | 3 most blamed prototypes |' in by_failures.table()
    assert '| veto | project | – | – | – | veto-s0c3k0 |' in by_name.table()
    assert by_failures.values()['veto', 'blamed'] == 3 and ('veto', 'blamed') not in by_name.values()


@pytest.mark.parametrize('facts', [
    dict(kind='veto'), dict(kind='veto', veto=((0, 0, 0),), blamed=1), dict(kind='project', veto=((0, 0, 0),)), dict(kind='project', blamed=2),
    dict(kind='veto', blamed=-1), dict(kind='train', train=Train(1, {}), blamed=1)], ids=str)
def test_a_stage_names_prototypes_or_a_number_if_it_is_a_veto_and_only_then(facts):
    with pytest.raises(ValueError, match="stage 'x': a veto, and nothing else, names prototypes or how many are blamed; got veto=.*, blamed="):
        Stage('x', **facts)


@pytest.mark.parametrize('facts', [dict(kind='project', veto=((0, 0, 0),), blamed=2), dict(kind='veto', veto=((0, 0, 0),), blamed=-1),
                                   dict(kind='project', blamed=-1)], ids=str)
def test_two_mistakes_in_a_stage_are_an_error_too(facts):
    with pytest.raises(ValueError, match="stage 'x'"): Stage('x', **facts)


def test_a_kind_that_does_not_exist_suggests_the_nearest():
    with pytest.raises(KeyError, match='veto'): Stage('x', 'vetos', blamed=1)


def test_recipes_without_anything_to_remove_are_an_error():
    with pytest.raises(ValueError, match='smoke/deeplabv2 has no projected prototypes to remove'): find_recipe('smoke', 'deeplabv2', 'veto-s0c0k0')
    with pytest.raises(ValueError, match='smoke/scaleprotoseg-tau is a variant; remove prototypes of smoke/scaleprotoseg'):
        vetoed(find_recipe('smoke', 'scaleprotoseg', 'tau'), [(0, 0, 0)])
    with pytest.raises(ValueError, match="stage 'veto'"): vetoed(MAIN)
    with pytest.raises(ValueError, match="stage 'veto'"): vetoed(MAIN, [(0, 0, 0)], blamed=1)
    with pytest.raises(KeyError, match='scaleprotoseg'): find_recipe('smoke', 'scaleprotosg', 'veto-s0c0k0')


def test_the_projection_may_have_any_name_and_head():
    recipe = find_recipe('smoke', 'prototype_view', 'veto-s0c0k1')
    assert [s.name for s in recipe.stages] == ['joint', 'snap', 'veto'] and recipe.last.parent == 'snap' and recipe.last.head == 'nearest'


# -- digests ----------------------------------------------------------------------------------------------------------

def digests(recipe): return {s.name: recipe.digest(s.name) for s in recipe.stages}


AFTER = ('veto', 'group_warmup', 'group_joint', 'threshold')


def test_a_veto_changes_the_digests_of_what_follows_and_of_nothing_before():
    others = [vetoed(MAIN, [(0, 3, 0)]), vetoed(MAIN, [(0, 3, 1)]), vetoed(MAIN, blamed=3), vetoed(MAIN, blamed=4)]
    main, *more = all_of_them = [digests(r) for r in (MAIN, *others)]
    for name in ('warmup', 'joint', 'project'): assert len({x[name] for x in all_of_them}) == 1
    for name in AFTER: assert len({x[name] for x in all_of_them if name in x}) == len(more) + (name in main)
    assert digests(vetoed(MAIN, [(0, 3, 1), (0, 3, 0)])) == digests(vetoed(MAIN, [(0, 3, 0), (0, 3, 1)]))


def test_a_veto_by_failures_depends_on_the_recipe_that_is_judged(monkeypatch):
    veto = find_recipe('smoke', 'scaleprotoseg', 'veto')
    by_name = find_recipe('smoke', 'scaleprotoseg', 'veto-s0c3k0')
    before, named = digests(veto), digests(by_name)
    monkeypatch.setitem(RECIPES, MAIN.name, replace(MAIN, stages=(*MAIN.stages[:-1], replace(MAIN.last, tau=.06))))
    after = digests(veto)
    assert {name for name in before if before[name] != after[name]} == set(AFTER)
    assert digests(by_name) == named                                        # a list is judged by nobody


def test_the_main_recipe_knows_nothing_of_a_veto(monkeypatch):
    before = {r.name: digests(r) for r in RECIPES.values() if 'veto' not in r.name}
    for stage in MAIN.stages: assert not {'veto', 'blamed'} & chosen(stage).keys()
    monkeypatch.setattr(recipes, 'RECIPES', {k: r for k, r in RECIPES.items() if 'veto' not in r.name})
    assert {r.name: digests(r) for r in recipes.RECIPES.values()} == before and 'smoke/scaleprotoseg-veto' not in recipes.RECIPES


# -- running ----------------------------------------------------------------------------------------------------------

NAMED = ((0, 3, 0), (2, 5, 1))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The main recipe, a veto by name, and one by failures."
    out = tmp_path_factory.mktemp('veto') / 'runs'
    run_method('smoke', 'pretrain', out=out, device='cpu')
    for variant in ('', veto_name(NAMED), 'veto'): run_method('smoke', 'scaleprotoseg', variant, out=out, device='cpu')
    return out


def folder(runs, variant='', stage='threshold'): return runs / f'smoke/scaleprotoseg{variant and "-" + variant}/seed0/{stage}'


def weights(path, file='head'): return read_tensors(path / f'{file}.safetensors')


def read(runs, variant, stage, name): return json.loads((folder(runs, variant, stage) / f'{name}.json').read_text())


def removed(runs, variant): return [tuple(x[k] for k in ('scale', 'cls', 'k')) for x in read(runs, variant, 'veto', 'veto')['removed']]


@pytest.fixture(params=[veto_name(NAMED), 'veto'], ids=['by name', 'by failures'])
def variant(request): return request.param


def test_removed_prototypes_are_dead_in_every_later_stage_and_all_others_as_before(runs, variant):
    before, gone = weights(folder(runs, stage='project'))['prototypes.alive'], removed(runs, variant)
    assert gone and (variant == 'veto' or set(gone) == set(NAMED)) and all(before[k] for k in gone)
    want = before.clone()
    for key in gone: want[key] = False
    for stage in AFTER:
        assert torch.equal(weights(folder(runs, variant, stage))['prototypes.alive'], want)
        assert torch.equal(load_model(folder(runs, variant, stage)).prototypes.alive, want)
    assert torch.equal(weights(folder(runs, variant, 'project'))['prototypes.alive'], before)     # the parent is left alone
    assert torch.equal(weights(folder(runs))['prototypes.alive'], before)                         # and so is the main variant


def test_features_and_prototypes_are_bit_equal_to_the_parents(runs, variant):
    main, vectors = folder(runs, stage='project'), weights(folder(runs, stage='project'))['prototypes.vectors']
    backbone, image = weights(main, 'backbone'), torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): features = load_model(main).features(image)
    for stage in AFTER:
        assert torch.equal(weights(folder(runs, variant, stage))['prototypes.vectors'], vectors)
        again = weights(folder(runs, variant, stage), 'backbone')
        assert again.keys() == backbone.keys() and all(torch.equal(again[k], backbone[k]) for k in backbone)
        with torch.no_grad(): assert torch.equal(load_model(folder(runs, variant, stage)).features(image), features)
        for name in ('prototypes.json', 'patches.webp'):
            assert (folder(runs, variant, stage) / name).read_bytes() == (main / name).read_bytes()


def test_removed_prototypes_have_no_weight_and_would_not_count_with_one(runs, variant):
    gone, image = removed(runs, variant), torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for stage in AFTER[1:]:
        model = load_model(folder(runs, variant, stage))
        for s, c, k in gone: assert (model.head.weights[c, :, s, k] == 0).all()
        with torch.no_grad():
            before = model(image, ['groups'])
            for s, c, k in gone:
                model.head.weights[c, :, s, k] = .5
                model.prototypes.vectors[s, c, k] = model.features(image)[0, s, :, 0, 0]           # very near somewhere
            after = model(image, ['groups'])
        assert torch.equal(after.logits, before.logits) and torch.equal(after.groups, before.groups)


def test_rows_are_on_the_simplex_after_retraining_and_cut_by_the_threshold(runs, variant):
    for stage in ('group_warmup', 'group_joint'):
        w = weights(folder(runs, variant, stage))['head.weights'].flatten(2)
        assert (w >= 0).all() and torch.allclose(w.sum(-1), torch.ones(w.shape[:2]), atol=1e-5)
    cut, w = weights(folder(runs, variant))['head.weights'], weights(folder(runs, variant, 'group_joint'))['head.weights']
    assert torch.equal(cut, w.where(w >= MAIN.last.tau, 0.))
    main = weights(folder(runs, stage='group_joint'))['head.weights']
    for c in {c for _, c, _ in removed(runs, variant)}: assert not torch.equal(w[c], main[c])     # trained again


def test_removing_changes_the_class_itself_before_any_training(runs, variant):
    "The linear head of `project` stays: logits change by what the prototypes gave."
    before, after = load_model(folder(runs, stage='project')), load_model(folder(runs, variant, 'veto'))
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = before(image, ['similarities']), after(image)
    gave = sum(before.head.weight[:, c, s, k, None, None] * a.similarities[0, s, c, k] for s, c, k in removed(runs, variant))
    assert torch.allclose(a.logits[0] - gave, b.logits[0], atol=1e-3) and gave.abs().max() > .01


def test_the_record_of_a_veto_by_name(runs):
    names, path = ('pavement', 'car'), folder(runs, veto_name(NAMED), 'veto')
    assert json.loads((path / 'veto.json').read_text()) == {
        'by': 'name', 'removed': [{'scale': s, 'cls': c, 'k': k, 'name': n} for (s, c, k), n in zip(NAMED, names)], 'kept_as_last_of_class': []}
    assert json.loads((path / 'metrics.json').read_text())['veto'] == {'by': 'name', 'removed': [list(k) for k in NAMED]}


def test_the_record_of_a_veto_by_failures_has_the_numbers_behind_it(runs):
    path, push = folder(runs, 'veto', 'veto'), open_dataset('partscapes', **MAIN.data.splits['push'])
    judge = load_model(folder(runs))                                       # the finished main variant
    count = count_blame(judge, push, MAIN.data.evaluation)
    chosen, kept = most_blamed(count, judge.prototypes.alive, 3)
    record = json.loads((path / 'veto.json').read_text())
    facts = lambda key: {**dict(zip(('scale', 'cls', 'k'), key)), 'name': push.labels.names[key[1]], **count.facts(key)}
    assert record == {'by': 'failures', 'split': 'push', 'images': 8, 'cases': count.cases, 'wrong_pixels': pytest.approx(float(count.wrong.sum())),
                      'right_pixels': pytest.approx(float(count.right.sum())), 'removed': [facts(k) for k in chosen],
                      'kept_as_last_of_class': [facts(k) for k in kept]}
    assert len(chosen) == 3 and count.cases > 0 and all(0 < x['share'] <= 1 and x['wrong_pixels'] > 0 for x in record['removed'])
    assert json.loads((path / 'metrics.json').read_text())['veto'] == {'by': 'failures', 'removed': [list(k) for k in chosen]}


def test_the_record_stands_in_every_later_folder_and_in_no_earlier_one(runs, variant):
    record = (folder(runs, variant, 'veto') / 'veto.json').read_bytes()
    assert all((folder(runs, variant, stage) / 'veto.json').read_bytes() == record for stage in AFTER)
    assert not any((folder(runs, variant, stage) / 'veto.json').exists() for stage in ('warmup', 'joint', 'project'))
    assert not list((runs / 'smoke/scaleprotoseg').rglob('veto.json'))


def test_every_stage_has_metrics_and_counts_the_living(runs, variant):
    alive = read(runs, '', 'project', 'metrics')['prototypes']['alive'] - len(removed(runs, variant))
    for stage in AFTER:
        found = read(runs, variant, stage, 'metrics')
        assert found['stage'] == stage and 0 < found['miou'] < 1 and found['prototypes']['alive'] == alive
        recipe = find_recipe('smoke', 'scaleprotoseg', variant)
        assert read_config(folder(runs, variant, stage))['recipe'] == recipe.name
        made = read(runs, variant, stage, 'provenance')
        assert made['recipe'] == recipe.digest(stage) and f'--variant {variant} --stage {stage}' in made['command']


def test_stages_before_the_veto_are_those_of_the_main_variant(runs, variant):
    for stage in ('warmup', 'joint', 'project'):
        for name in ('head', 'backbone'):
            a, b = (folder(runs, v, stage) / f'{name}.safetensors' for v in ('', variant))
            assert a.read_bytes() == b.read_bytes()
        assert read(runs, variant, stage, 'provenance') == read(runs, '', stage, 'provenance')


def test_a_finished_veto_is_not_run_again(runs, variant):
    file = folder(runs, variant) / 'metrics.json'
    before = file.stat().st_mtime_ns
    assert run_method('smoke', 'scaleprotoseg', variant, out=runs, device='cpu')[-1] == file.parent and file.stat().st_mtime_ns == before


# -- what cannot be ---------------------------------------------------------------------------------------------------

@pytest.fixture
def begun(runs, tmp_path):
    "The same runs, the variants left out. Files are links: a test deletes them and never writes into them."
    for name in ('pretrain', 'scaleprotoseg', 'data'):
        shutil.copytree(runs / 'smoke' / name, tmp_path / 'runs/smoke' / name, copy_function=os.link)
    return tmp_path / 'runs'


def run(out, variant): return run_method('smoke', 'scaleprotoseg', variant, out=out, device='cpu')


@pytest.mark.parametrize('name', [veto_name(NAMED), 'veto'])
def test_a_veto_of_prototypes_that_would_be_others_is_refused_before_any_training(begun, name):
    text = f'removes prototypes of {folder(begun, stage="warmup").parent}, so warmup is not trained again, and that one cannot be taken over: precision 64-true, there 32-true'
    with pytest.raises(ValueError, match=re.escape(text)):
        run_method('smoke', 'scaleprotoseg', name, out=begun, device='cpu', precision='64-true')
    assert not list(begun.glob('smoke/scaleprotoseg-*/seed0/*/metrics.json'))


def test_a_run_of_a_veto_by_name_is_known_by_its_recipe(runs, variant):
    place = folder(runs, variant).parent
    assert last_stage(place).name == 'threshold' and named_recipe(f'smoke/scaleprotoseg-{variant}').variant == variant
    assert named_recipe('smoke/scaleprotosex-veto-s0c0k0') is None and named_recipe('nothing/at-all') is None


def test_a_veto_by_failures_waits_for_the_main_variant_and_names_its_folder(begun):
    main = folder(begun)
    (main / 'metrics.json').unlink()
    text = f'veto of smoke/scaleprotoseg-veto looks at the failures of {main}, which is not finished; run that stage first'
    with pytest.raises(FileNotFoundError, match=re.escape(text)):
        run(begun, 'veto')
    assert not folder(begun, 'veto', 'veto').exists() and folder(begun, 'veto', 'project').exists()
    for stage in ('warmup', 'joint', 'project', 'veto'):                                      # a list needs no judge
        run_stage('smoke', 'scaleprotoseg', stage, veto_name(NAMED), out=begun, device='cpu')


def test_a_veto_needs_projected_prototypes_first(begun):
    with pytest.raises(FileNotFoundError, match='veto of smoke/scaleprotoseg-veto-s0c3k0 starts from .*/project, which is not finished'):
        run_stage('smoke', 'scaleprotoseg', 'veto', 'veto-s0c3k0', out=begun, device='cpu')


def test_a_main_variant_of_another_recipe_is_no_judge(begun):
    main = folder(begun)
    (main / 'recipe.json').unlink()
    (main / 'recipe.json').write_text('"other"')
    with pytest.raises(ValueError, match=re.escape(f'{main} was made by another recipe')): run(begun, 'veto')
    assert not folder(begun, 'veto', 'veto').exists()


def test_a_class_that_would_be_left_without_a_prototype_is_an_error_that_names_it(begun):
    alive = weights(folder(begun, stage='project'))['prototypes.alive'].clone()
    whole = [(s, 9, k) for s, k in torch.nonzero(alive[:, 9]).tolist()]
    assert len(whole) > 1
    with pytest.raises(ValueError, match='zebra would be left without a living prototype: keep at least one, e.g. {},9,{}'.format(*whole[-1][::2])):
        run(begun, veto_name(whole))
    assert not (folder(begun, veto_name(whole), 'veto') / 'metrics.json').exists()


@pytest.mark.parametrize('key', [(4, 0, 0), (0, 10, 0), (0, 0, 3)])
def test_a_prototype_that_does_not_exist_is_an_error_that_says_which_do(begun, key):
    text = 'there is no prototype {},{},{}: expected scale 0..3, class 0..9 and number 0..2, all from 0'.format(*key)
    with pytest.raises(ValueError, match=re.escape(text)): run(begun, veto_name([key]))
    assert not (folder(begun, veto_name([key]), 'veto') / 'veto.json').exists()


def test_a_dead_prototype_cannot_be_removed(begun):
    alive = weights(folder(begun, stage='project'))['prototypes.alive']
    key, name = tuple(torch.nonzero(~alive)[0].tolist()), open_dataset('partscapes', **MAIN.data.splits['val']).labels.names
    with pytest.raises(ValueError, match='prototype {},{},{} of {} is dead already'.format(*key, name[key[1]])): run(begun, veto_name([key]))


def test_without_failures_nothing_is_removed(begun, monkeypatch):
    def none(model, *_): return BlameCount(*torch.zeros(2, *model.prototypes.alive.shape, dtype=torch.float64), 0, 8)
    monkeypatch.setattr(training, 'count_blame', none)
    for stage in ('warmup', 'joint', 'project', 'veto'): run_stage('smoke', 'scaleprotoseg', stage, 'veto', out=begun, device='cpu')
    record = json.loads((folder(begun, 'veto', 'veto') / 'veto.json').read_text())
    assert (record['cases'], record['removed'], record['kept_as_last_of_class']) == (0, [], [])
    a, b = weights(folder(begun, 'veto', 'veto')), weights(folder(begun, stage='project'))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_control_removes_what_the_seed_draws_and_says_so(begun, monkeypatch):
    recipe = vetoed(MAIN, blamed=3, drawn=True)
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    for stage in ('warmup', 'joint', 'project', 'veto'): run_stage('smoke', 'scaleprotoseg', stage, 'veto_random', out=begun, device='cpu')
    record, judge = read(begun, 'veto_random', 'veto', 'veto'), load_model(folder(begun))
    count = count_blame(judge, open_dataset('partscapes', **MAIN.data.splits['push']), MAIN.data.evaluation)
    keys, _ = drawn_at_random(count, judge.prototypes.alive, 3, rng('veto', 0))
    assert record['by'] == 'chance' and [(x['scale'], x['cls'], x['k']) for x in record['removed']] == keys and len(keys) == 3
    before, after = (weights(folder(begun, *where))['prototypes.alive'] for where in (('', 'project'), ('veto_random', 'veto')))
    assert sorted(map(tuple, torch.nonzero(before & ~after).tolist())) == sorted(keys)


def test_the_last_prototype_of_a_class_stays_and_the_record_says_so(begun, monkeypatch):
    "All wrong pixels are the zebra's prototypes', the same number for each; more are to go than there are."
    recipe = vetoed(MAIN, blamed=50, variant='veto50')
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    def zebras(model, *_):
        wrong = torch.zeros(model.prototypes.alive.shape, dtype=torch.float64)
        wrong[:, 9] = 1.
        return BlameCount(wrong, wrong, 1, 8)
    monkeypatch.setattr(training, 'count_blame', zebras)
    for stage in ('warmup', 'joint', 'project', 'veto'): run_stage('smoke', 'scaleprotoseg', stage, 'veto50', out=begun, device='cpu')
    before, after = (weights(folder(begun, *where))['prototypes.alive'] for where in (('', 'project'), ('veto50', 'veto')))
    *gone, last = map(tuple, torch.nonzero(before[:, 9]).tolist())
    assert torch.nonzero(after[:, 9]).tolist() == [list(last)] and torch.equal(after[:, :9], before[:, :9])
    record = read(begun, 'veto50', 'veto', 'veto')
    fact = lambda s, k: {'scale': s, 'cls': 9, 'k': k, 'name': 'zebra', 'wrong_pixels': 1., 'right_pixels': 1., 'share': .5}
    assert record['removed'] == [fact(*x) for x in gone] and record['kept_as_last_of_class'] == [fact(*last)]
