"""Bad input gets one clear line that names the file or value, before training starts, and nothing is left half done."""
import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaleprotoseg import cli, data, recipes, report, runs, training
from scaleprotoseg.basics import Interrupted
from scaleprotoseg.partscapes import PartScapes
from scaleprotoseg.predict import load
from scaleprotoseg.training import run_stage


def call(monkeypatch, capsys, *arguments):
    """Exit code and error text of the command line."""
    monkeypatch.setattr(sys, 'argv', ['scaleprotoseg', *map(str, arguments)])
    with pytest.raises(SystemExit) as e: cli.main()
    return e.value.code, capsys.readouterr().err


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp('pretrained')
    run_stage('smoke', 'pretrain', 'joint', out=out, device='cpu')
    return out


@pytest.mark.parametrize('arguments, expected', [
    (('run', 'dem', 'protoseg'), "unknown experiment 'dem'; did you mean 'demo'?"),
    (('run', 'demo', 'protseg'), "did you mean 'protoseg'?"),
    (('run', 'demo', 'protoseg', '--stage', 'proyect'), "did you mean 'project'?"),
    (('list', 'smok'), "did you mean 'smoke'?"),
    (('check', 'em-quik'), "did you mean 'em-quick'?"),
])
def test_unknown_names_suggest_the_nearest(monkeypatch, capsys, arguments, expected):
    code, text = call(monkeypatch, capsys, *arguments)
    assert code == 2 and expected in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize('arguments', [('reproduce',), ('notebook', 'a.ipynb', 'b.ipynb'), ('report', 'demo')])
def test_without_the_extra_it_says_which_one_to_install(monkeypatch, capsys, arguments):
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    for name in ('papermill', 'pandas', 'nbformat'): monkeypatch.setitem(sys.modules, name, None)
    code, text = call(monkeypatch, capsys, *arguments)
    assert code == 2 and 'is not installed; it comes with `pip install "scaleprotoseg[repro]"`' in text


def test_a_failed_write_names_the_file(tmp_path):
    from scaleprotoseg.model import save_weights
    with pytest.raises(OSError, match='absent'):
        save_weights(torch.nn.Linear(1, 1), tmp_path / 'absent')


def test_a_stage_whose_parent_is_missing_says_which(monkeypatch, capsys, tmp_path):
    code, text = call(monkeypatch, capsys, 'run', 'smoke', 'protoseg', '--out', tmp_path, '--device', 'cpu')
    assert code == 2 and 'pretrain' in text and 'not finished' in text
    assert '`scaleprotoseg train smoke --method protoseg --seed 0`' in text


def test_missing_dataset_prints_the_expected_tree(monkeypatch, capsys, tmp_path):
    code, text = call(monkeypatch, capsys, 'run', 'em-quick', 'unet', '--data-root', tmp_path, '--out', tmp_path / 'runs', '--device', 'cpu')
    assert code == 2 and 'train-volume.tif' in text and 'images' in text
    assert not list((tmp_path / 'runs').rglob('log.csv'))


def em(folder, labels=lambda i: np.zeros((512, 512), np.uint8)):
    """A miniature of the folder layout with arbitrary labels."""
    for kind in ('images', 'labels'): (folder / kind).mkdir(parents=True)
    for i in range(30):
        Image.fromarray(np.full((512, 512), 100, np.uint8)).save(folder / 'images' / f'{i:02d}.png')
        Image.fromarray(labels(i)).save(folder / 'labels' / f'{i:02d}.png')
    return folder


@pytest.mark.parametrize('labels, expected', [
    (lambda i: np.full((512, 512), 7 if i == 3 else 0, np.uint8), ('03.png', '7')),
    (lambda i: np.zeros((512, 500) if i == 3 else (512, 512), np.uint8), ('03.png', '500')),
])
def test_a_bad_label_is_found_before_training(monkeypatch, capsys, tmp_path, labels, expected):
    code, text = call(monkeypatch, capsys, 'run', 'em-quick', 'unet', '--data-root', em(tmp_path / 'em', labels), '--out', tmp_path / 'runs', '--device', 'cpu')
    assert code == 2 and all(x in text for x in expected)
    assert not list((tmp_path / 'runs').rglob('log.csv')), 'training had not started'


def test_an_unreadable_image_is_named(monkeypatch, capsys, tmp_path):
    folder = em(tmp_path / 'em')
    path = folder / 'images' / '05.png'
    path.write_bytes(path.read_bytes()[:200])
    code, text = call(monkeypatch, capsys, 'run', 'em-quick', 'unet', '--data-root', folder, '--out', tmp_path / 'runs', '--device', 'cpu')
    assert code == 2 and '05.png' in text


def test_no_disk_space_is_said_before_anything_is_written(monkeypatch, tmp_path):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(runs.shutil, 'disk_usage', lambda p: usage(10, 10, 1000))
    with pytest.raises(OSError, match='not enough disk space'): run_stage('smoke', 'pretrain', 'joint', out=tmp_path, device='cpu')
    assert not list(tmp_path.rglob('*.safetensors')) and not list(tmp_path.rglob('metrics.json'))


@pytest.mark.parametrize('damage, expected', [
    (lambda p: p.write_bytes(p.read_bytes()[:1000]), 'not a complete safetensors file'),
    (lambda p: p.unlink(), 'no weights'),
])
def test_a_damaged_parent_is_named(pretrained, tmp_path, damage, expected):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    damage(out / 'smoke/pretrain/seed0/joint/backbone.safetensors')
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as e:
        run_stage('smoke', 'protoseg', 'warmup', out=out, device='cpu')
    assert 'backbone.safetensors' in str(e.value)
    assert not (out / 'smoke/protoseg/seed0/warmup/metrics.json').exists()


def test_a_checkpoint_of_another_architecture_is_refused(pretrained, tmp_path):
    out = tmp_path / 'runs'
    shutil.copytree(pretrained, out)
    run_stage('smoke', 'protoseg', 'warmup', out=out, device='cpu')
    old = recipes.RECIPES['smoke/linear']
    run_stage('smoke', 'linear', 'joint', out=out, device='cpu')
    shutil.copy(out / old.name / 'seed0/joint/head.safetensors', out / 'smoke/protoseg/seed0/warmup/head.safetensors')
    with pytest.raises(ValueError, match='another architecture'): run_stage('smoke', 'protoseg', 'joint', out=out, device='cpu')


@pytest.fixture(params=[True, False], ids=['in memory', 'from files'])
def mine(request, tmp_path, monkeypatch):
    "A folder of four pictures with label maps, and small recipes for it; returns a function that writes the label maps, and the options of `run_stage`."
    root, roles = tmp_path / 'mine', {'train': {'split': 'train'}, 'push': {'split': 'train'}, 'val': {'split': 'val'}}
    def write(left=0, names=('a', 'b')):
        for split in ('train', 'val'):
            for i in range(2):
                for kind in ('images', 'labels'): (root / kind / split).mkdir(parents=True, exist_ok=True)
                label = np.full((64, 96), left, np.uint8)
                label[:, 48:] = 1 - left if left < 2 else left
                Image.fromarray(label * 50).save(root / 'images' / split / f'{i}.png')
                Image.fromarray(label).save(root / 'labels' / split / f'{i}.png')
        (root / 'labels.json').write_text(json.dumps({'names': names, 'void': [255]}))
    for method in ('pretrain', 'protoseg'):
        r = recipes.RECIPES[f'smoke/{method}']
        r = replace(r, experiment='mine', data=replace(r.data, dataset='folder', splits=roles, crop=(64, 96), in_memory=request.param))
        monkeypatch.setitem(recipes.RECIPES, r.name, r)
    write()
    return write, dict(out=tmp_path / 'runs', data_root=root, device='cpu')


def contents(folder): return json.loads((folder / 'provenance.json').read_text())['data']['train']['contents']


def test_labels_that_were_corrected_are_read_again_and_not_mixed_with_what_they_were(mine):
    write, options = mine
    first = run_stage('mine', 'pretrain', 'joint', **options)
    run_stage('mine', 'protoseg', 'warmup', **options)
    write(left=1, names=['a', 'b'])                                            # as many pixels of each, elsewhere
    label = options['data_root'] / 'labels/train/0.png'
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(label)
    assert contents(run_stage('mine', 'pretrain', 'joint', seed=1, **options)) != contents(first)
    with pytest.raises(ValueError, match='warmup was made of other train images than there are now'): run_stage('mine', 'protoseg', 'joint', **options)
    shutil.rmtree(options['out'] / 'mine/protoseg')
    with pytest.raises(ValueError, match='pretrain/seed0/joint was made of other train images'): run_stage('mine', 'protoseg', 'warmup', **options)


def test_a_finished_stage_is_not_passed_off_as_one_of_other_images(mine, capsys):
    write, options = mine
    folder = run_stage('mine', 'pretrain', 'joint', **options)
    assert run_stage('mine', 'pretrain', 'joint', **options) == folder
    assert run_stage('mine', 'pretrain', 'joint', **{**options, 'data_root': options['data_root'] / 'nowhere'}) == folder
    assert 'its images were not looked at' in capsys.readouterr().err
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(options['data_root'] / 'labels/val/0.png')
    with pytest.raises(ValueError, match='pretrain/seed0/joint was made of other val images'): run_stage('mine', 'pretrain', 'joint', **options)


def test_pixels_that_move_and_leave_all_counts_alike_are_other_images(mine):
    write, options = mine
    folder = run_stage('mine', 'pretrain', 'joint', **options)
    label = options['data_root'] / 'labels/val/0.png'
    Image.fromarray(np.asarray(Image.open(label))[:, ::-1].copy()).save(label)
    with pytest.raises(ValueError, match='pretrain/seed0/joint was made of other val images'): run_stage('mine', 'pretrain', 'joint', **options)
    write()
    (options['data_root'] / 'labels.json').write_text((options['data_root'] / 'labels.json').read_text().replace('{', '{"colors": [[1, 2, 3], [4, 5, 6]], ', 1))
    assert run_stage('mine', 'pretrain', 'joint', **options) == folder, 'other colours are no other images'
    facts = json.loads((folder / 'provenance.json').read_text())                # of a stage that is older than this digest
    for role in facts['data'].values(): del role['files']
    (folder / 'provenance.json').write_text(json.dumps(facts))
    Image.fromarray(np.asarray(Image.open(label))[:, ::-1].copy()).save(label)
    assert run_stage('mine', 'pretrain', 'joint', **options) == folder, 'told by what both say'


def test_pictures_of_other_images_do_not_stand_beside_scores(mine, monkeypatch, tmp_path):
    write, options = mine
    run_stage('mine', 'pretrain', 'joint', **options)
    opened = report.open_run(options['out'], 'mine', 'pretrain', device='cpu')
    assert len(opened.split('val', options['data_root'])) == 2
    copy = shutil.copytree(options['data_root'], tmp_path / 'copy')             # the same images in another place
    assert len(opened.split('val', copy)) == 2
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(copy / 'labels/val/0.png')
    with pytest.raises(ValueError, match='pretrain/seed0/joint was made of other val images than there are now'): opened.split('val', copy)
    assert len(opened.split('val', copy, split='train')) == 2                   # asked for by name
    assert len(opened.split('train', copy)) == 2


def test_an_image_in_training_and_validation_is_named(mine):
    write, options = mine
    with pytest.warns(UserWarning, match=r'2 images are in the train split and in the val split \(0, 1\)'): run_stage('mine', 'pretrain', 'joint', **options)


def test_a_stage_that_never_began_does_not_block_its_folder(mine):
    write, options = mine
    folder = options['out'] / 'mine/pretrain/seed0/joint'
    folder.mkdir(parents=True)
    (folder / 'recipe.json').write_text('"another"')
    assert run_stage('mine', 'pretrain', 'joint', **options) == folder


def test_a_training_does_not_go_on_with_other_images(mine):
    write, options = mine
    def stopped(*a, **k): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, '_finish', stopped)                              # all updates are done, and saved
        run_stage('mine', 'pretrain', 'joint', **options)
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(options['data_root'] / 'labels/train/0.png')
    with pytest.raises(ValueError, match='pretrain/seed0/joint was begun with other images'): run_stage('mine', 'pretrain', 'joint', **options)
    write()
    assert run_stage('mine', 'pretrain', 'joint', **options)


def test_a_trunk_of_another_dataset_is_a_start_like_any_other(mine, monkeypatch):
    write, options = mine
    monkeypatch.setitem(data.DATASETS, 'other', lambda split, root=None: PartScapes(split, n=4, size=(64, 96)))      # splits of the same names
    pretrain = recipes.RECIPES['mine/pretrain']
    monkeypatch.setitem(recipes.RECIPES, 'mine/pretrain', replace(pretrain, data=replace(pretrain.data, dataset='other')))
    run_stage('mine', 'pretrain', 'joint', **options)
    assert run_stage('mine', 'protoseg', 'warmup', **options)


def test_images_without_a_label_cannot_be_trained_on_and_a_class_without_a_pixel_is_named(mine):
    write, options = mine
    write(left=255)
    with pytest.raises(ValueError, match='train split of mine/pretrain has no labelled pixel'): run_stage('mine', 'pretrain', 'joint', **options)
    write()
    for path in (options['data_root'] / 'labels/val').glob('*.png'): Image.fromarray(np.full((64, 96), 255, np.uint8)).save(path)
    with pytest.raises(ValueError, match='val split of mine/pretrain has no labelled pixel'): run_stage('mine', 'pretrain', 'joint', **options)
    write(names=['a', 'b', 'rare'])
    with pytest.warns(UserWarning, match='train split of mine/pretrain never shows rare'): run_stage('mine', 'pretrain', 'joint', **options)


def test_predictions_of_two_black_boxes_or_of_other_images_are_not_mixed(mine, monkeypatch, capsys, tmp_path):
    write, options = mine
    for seed in (0, 1): run_stage('mine', 'pretrain', 'joint', seed=seed, **options)
    def export(seed):
        monkeypatch.setattr(sys, 'argv', ['scaleprotoseg', 'export', str(options['out'] / f'mine/pretrain/seed{seed}'), str(tmp_path / 'sub'), '--split', 'val',
                                          '--data-root', str(options['data_root'])])
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code, ' '.join(capsys.readouterr())
    code, text = export(0)
    assert code == 0 and '2 files written' in text
    code, text = export(1)                                                      # its head is as empty as the other one's
    assert code == 2 and 'holds predictions of' in text
    assert '0 files written' in export(0)[1]
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(options['data_root'] / 'images/val/1.png')
    code, text = export(0)
    assert code == 2 and 'holds predictions of' in text


def test_no_time_at_all_is_not_all_the_time(tmp_path):
    with pytest.raises(Interrupted, match='out of time before it began'): run_stage('smoke', 'pretrain', 'joint', out=tmp_path, device='cpu', max_minutes=0)


@pytest.mark.parametrize('arguments', [('figures', 'demo', '--runs', 'RUNS'), ('notebook', 'nbs/paper/scaleprotoseg/table_01.ipynb', 'x.ipynb', '-p', 'runs=RUNS'),
                                       ('figures', 'em-quick-ablations', '--runs', 'RUNS', '--recorded', 'RUNS')], ids=['figures', 'notebook', 'recorded'])
def test_results_are_not_replaced_by_empty_tables(monkeypatch, capsys, tmp_path, arguments):
    folder, words = Path(__file__).parents[1], [a.replace('RUNS', str(tmp_path)) for a in arguments]
    monkeypatch.chdir(folder)
    before = {p: p.stat().st_mtime_ns for p in (folder / 'figures').rglob('*.md')}
    code, text = call(monkeypatch, capsys, *words)
    assert code == 2 and f'no finished run of {"em-quick-ablations" if "--recorded" in arguments else "demo"} in {tmp_path}' in text
    assert before == {p: p.stat().st_mtime_ns for p in (folder / 'figures').rglob('*.md')} and not (folder / 'x.ipynb').exists()


def test_an_empty_split_is_an_error(tmp_path, monkeypatch):
    class Nothing:
        labels, ids = data.Labels(('a', 'b'), ((0, 0, 0), (1, 1, 1))), []
        def __init__(self, split, root=None): pass
        def __len__(self): return 0
        def __getitem__(self, i): raise IndexError(i)
    monkeypatch.setitem(data.DATASETS, 'nothing', Nothing)
    smoke = recipes.RECIPES['smoke/pretrain']
    empty = replace(smoke, method='empty', data=replace(smoke.data, dataset='nothing', splits={'train': {'split': 'train'}, 'val': {'split': 'val'}}))
    monkeypatch.setitem(recipes.RECIPES, empty.name, empty)
    with pytest.raises(ValueError, match='train split of smoke/empty has no images'): training.run_stage('smoke', 'empty', 'joint', out=tmp_path, device='cpu')


@pytest.mark.parametrize('options', [{'device': 'tpuu'}, {'device': 'cpu', 'precision': '31'}])
def test_a_wrong_device_or_precision_is_said(options, tmp_path):
    with pytest.raises(ValueError, match='cannot use device|unknown device'): run_stage('smoke', 'pretrain', 'joint', out=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_here_is_not_replaced_in_silence(tmp_path):
    if torch.cuda.is_available(): pytest.skip('this machine has CUDA')
    with pytest.raises(ValueError, match='cuda'): run_stage('smoke', 'pretrain', 'joint', out=tmp_path, device='cuda')


def test_a_notebook_parameter_that_does_not_exist(monkeypatch, capsys, tmp_path):
    notebook = Path(__file__).parents[1] / 'nbs/stages/train.ipynb'
    code, text = call(monkeypatch, capsys, 'notebook', notebook, tmp_path / 'x.ipynb', '-p', 'seeed=1')
    assert code == 2 and 'seeed' in text and 'seed' in text and not (tmp_path / 'x.ipynb').exists()
    code, text = call(monkeypatch, capsys, 'notebook', notebook, tmp_path / 'x.ipynb', '-p', 'seed=two')
    assert code == 2 and 'seed' in text and 'int' in text


@pytest.mark.parametrize('change, expected', [
    (lambda r: replace(r, data=replace(r.data, splits={**r.data.splits, 'puch': {'split': 'train'}})), "unknown role of a split 'puch'; did you mean 'push'"),
    (lambda r: replace(r, data=replace(r.data, splits={k: v for k, v in r.data.splits.items() if k != 'val'})), "splits['val']=None"),
    (lambda r: replace(r, data=replace(r.data, splits={k: v for k, v in r.data.splits.items() if k != 'push'})), "smoke/scaleprotoseg: splits['push'] is missing"),
    (lambda r: replace(r, data=replace(r.data, crop=64)), 'crop=64: expected (height, width)'),
    (lambda r: replace(r, model={k: v for k, v in r.model.items() if k != 'groups'}), "smoke/scaleprotoseg: a model with head 'groups' needs 'groups'"),
    (lambda r: replace(r, model={**r.model, 'per_class': 0}), 'per_class=0: expected a whole number of at least 1'),
    (lambda r: replace(r, stages=()), 'smoke/scaleprotoseg has no stages'),
    (lambda r: replace(r, variant='a/b'), "variant 'a/b': expected letters"),
    (lambda r: changed_stage(r, 'threshold', tau=None), 'tau=None: expected a number of at least 0'),
    (lambda r: changed_stage(r, 'threshold', tau=5.), 'tau=5.0: expected less than 1'),
    (lambda r: changed_stage(r, 'joint', train=None), "stage 'joint': a stage of kind train, and no other, has a Train"),
    (lambda r: changed_stage(r, 'joint', head='direct'), "stage 'joint': the head 'direct' has no prototypes"),
    (lambda r: trained(r, steps=2.5), 'steps=2.5: expected a whole number of at least 1'),
    (lambda r: trained(r, eval_every=-2), 'eval_every=-2: expected a whole number of at least 0'),
    (lambda r: trained(r, decay=-1.), 'decay=-1.0: expected a number of at least 0'),
    (lambda r: trained(r, lr={'trunk': -1e-3}), 'learning rate of trunk=-0.001: expected a number of at least 0'),
    (lambda r: trained(r, lr={'trunc': 1e-3}), "unknown part to train 'trunc'; did you mean 'trunk'"),
    (lambda r: trained(r, entropy=.1), "stage 'joint': the head 'linear' has no entropy; heads that have: groups"),
])
def test_a_wrong_recipe_is_refused_when_it_is_made(change, expected):
    with pytest.raises((ValueError, KeyError)) as e: change(recipes.RECIPES['smoke/scaleprotoseg'])
    assert expected in str(e.value)


def changed_stage(r, name, **values): return replace(r, stages=tuple(replace(s, **values) if s.name == name else s for s in r.stages))


def trained(r, **values): return changed_stage(r, 'joint', train=replace(r.stage('joint').train, **values))


@pytest.mark.parametrize('k, keep', [(2, 3), (-2, 1), (6, None)])
def test_pruning_keeps_no_more_than_it_looks_at(k, keep):
    with pytest.raises(ValueError, match='keep|k='): changed_stage(recipes.RECIPES['smoke/protoseg'], 'prune', k=k, keep=keep)


@pytest.mark.parametrize('text, expected', [
    ('x = 1\nx.y', "line 2: AttributeError: 'int' object has no attribute 'y'"), ('x = (', 'line 1: SyntaxError'),
    ('\nfrom scaleprotoseg.recipes import find_recipe\nfind_recipe("smoke", "protosed")', "line 3: unknown method"),
])
def test_a_mistake_in_a_file_of_recipes_is_named_with_its_line(monkeypatch, capsys, tmp_path, text, expected):
    (tmp_path / 'mine.py').write_text(text)
    code, said = call(monkeypatch, capsys, '--recipes', tmp_path / 'mine.py', 'list')
    assert code == 2 and f'{tmp_path / "mine.py"}, {expected}' in said


@pytest.mark.parametrize('command, words', [(('reproduce', '--experiment', 'smoke'), '`train`, `figures` and `report`'),
                                            (('notebook', 'nbs/paper/scaleprotoseg/table_01.ipynb', 'out.ipynb'), '`figures` runs notebooks here')], ids=['reproduce', 'notebook'])
def test_recipes_that_would_not_reach_another_program_are_refused(monkeypatch, capsys, tmp_path, command, words):
    (tmp_path / 'mine.py').write_text('')
    code, said = call(monkeypatch, capsys, '--recipes', tmp_path / 'mine.py', *command)
    assert code == 2 and f'--recipes {tmp_path / "mine.py"} does not reach {command[0]}' in said and words in said


def test_wrong_options_of_a_dataset_suggest_the_nearest():
    with pytest.raises(KeyError, match="unknown option of dataset 'partscapes' 'sede'; did you mean 'seed'"): data.open_dataset('partscapes', 'val', sede=3)


def test_outputs_do_not_replace_what_is_not_theirs(monkeypatch, capsys, pretrained, tmp_path):
    run, picture = pretrained / 'smoke/pretrain/seed0/joint', tmp_path / 'a.png'
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    before = picture.read_bytes()
    assert 'is the picture itself' in call(monkeypatch, capsys, 'predict', run, picture, '--output', picture)[1] and picture.read_bytes() == before
    assert 'ends in .png' in call(monkeypatch, capsys, 'predict', run, picture, '--output', tmp_path / 'b.jpg')[1]
    assert 'expected the folder for b.png' in call(monkeypatch, capsys, 'predict', run, picture, '--output', tmp_path / 'absent/b.png')[1]
    (tmp_path / 'labels.json').write_text('{"names": ["a"]}')
    assert 'is no explanation' in call(monkeypatch, capsys, 'explain', run, picture, '--at', 3, 4, '--output', tmp_path / 'labels.png')[1]


def test_predict_names_the_picture_and_the_run(monkeypatch, capsys, pretrained, tmp_path):
    run = pretrained / 'smoke/pretrain/seed0/joint'
    assert 'nowhere.jpg' in call(monkeypatch, capsys, 'predict', run, tmp_path / 'nowhere.jpg')[1]
    assert 'nothing-here' in call(monkeypatch, capsys, 'predict', tmp_path / 'nothing-here', tmp_path / 'x.jpg')[1]
    picture = tmp_path / 'a.png'
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    code, text = call(monkeypatch, capsys, 'explain', run, picture, '--at', 3, 4)
    assert code == 2 and 'prototype' in text, 'a black box has nothing to explain with'


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['scaleprotoseg', *map(str, arguments)])
    with pytest.raises(SystemExit) as e: cli.main()
    assert not e.value.code


def test_predictions_come_as_numbers_too_and_only_they_are_replaced(monkeypatch, capsys, pretrained, tmp_path):
    run, picture, out, ids = pretrained / 'smoke/pretrain/seed0/joint', tmp_path / 'a.png', tmp_path / 'p.png', tmp_path / 'i.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(picture)
    for window in ((), ('--window', 32, 32)):                              # the second time over what the first has written
        command(monkeypatch, 'predict', run, picture, '--output', out, '--ids', ids, *window)
        numbers, colours = np.asarray(Image.open(ids)), np.asarray(Image.open(out))
        assert numbers.shape == (48, 64) and numbers.dtype == np.uint8
        assert (colours == load(run).labels.colorize(numbers.astype(np.int64))).all()
    Image.open(picture).save(out)
    before = out.read_bytes()
    code, text = call(monkeypatch, capsys, 'predict', run, picture, '--output', out)
    assert code == 2 and 'was not written by this command and is not replaced' in text and out.read_bytes() == before
    code, text = call(monkeypatch, capsys, 'explain', run, picture, '--at', 1, 1, '--output', out)
    assert code == 2 and 'has no explanation beside it (p.json) and is not replaced' in text and out.read_bytes() == before


@pytest.mark.parametrize('error, expected', [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nmore"), "not enough memory ([enforce fail at alloc_cpu.cpp:127]"),
    (RuntimeError('CUDA out of memory. Tried to allocate'), 'not enough memory (CUDA out of memory'), (MemoryError(), 'not enough memory (MemoryError)')])
def test_too_little_memory_is_one_line(monkeypatch, capsys, error, expected):
    def fail(): raise error
    monkeypatch.setattr(cli, 'app', fail)
    code, text = call(monkeypatch, capsys)
    assert code == 2 and expected in text and len(text.splitlines()) == 1
    monkeypatch.setattr(cli, 'app', lambda: (_ for _ in ()).throw(RuntimeError('shapes differ')))
    with pytest.raises(RuntimeError, match='shapes differ'): cli.main()


def test_a_recipe_may_be_added_again_but_not_another_of_its_name():
    r = replace(recipes.find_recipe('smoke', 'pretrain'), experiment='again')
    recipes.add_recipes(r)
    try:
        recipes.add_recipes(r)
        with pytest.raises(ValueError, match=r"another recipe 'again/pretrain'; to change one of your own, `RECIPES.pop"): recipes.add_recipes(replace(r, seeds=(5,)))
    finally: recipes.RECIPES.pop('again/pretrain')
