"""The numbers of the papers, as data: their format, their agreement with each other, and a spot check typed by hand."""
import csv
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / 'data' / 'published'
TABLES = sorted(p for p in FOLDER.glob('*.csv') if p.stem not in ('recipes', 'contents'))     # these have other columns
COLUMNS = ['method', 'step', 'setting', 'data', 'metric', 'value', 'std', 'source', 'note']
METRICS = {'miou', 'prototypes', 'reduction_percent', 'group_average', 'consistency', 'stability', 'sparsity', 'group_overlap',
           'average_weight', 'extra_parameters', 'iterations_per_second', 'parameters_million'}
PERCENT = {'miou', 'consistency', 'stability', 'group_overlap', 'reduction_percent'}
SIZES = {'deeplabv2_reference': 6, 'protoseg_main': 8, 'protoseg_supplement_table_01': 7, 'scaleprotoseg_table_01': 15,
         'scaleprotoseg_table_02': 30, 'scaleprotoseg_table_03': 6, 'scaleprotoseg_table_04': 6, 'scaleprotoseg_table_05': 4,
         'scaleprotoseg_table_06': 3, 'scaleprotoseg_table_07': 27, 'scaleprotoseg_table_08': 18, 'scaleprotoseg_table_09': 6,
         'scaleprotoseg_table_10': 18, 'prototype_view_supplement_table_01': 17, 'prototype_view_supplement_table_02': 10,
         'prototype_view_supplement_table_03': 12}
OTHERS = {'FCN', 'PSPNet', 'PSANet', 'DeepLabV3+', 'ContrastiveSeg', 'SETR', 'HRNetV2', 'CCNet', 'HANet', 'segformer', 'hrnet'}   # beside the prototype view


def rows(path: Path) -> list[dict]:
    with path.open(newline='', encoding='utf-8') as f: return list(csv.DictReader(f, strict=True))


@pytest.fixture(scope='module')
def values() -> dict[tuple, float]:
    "(file, method, step, setting, data, metric) -> value"
    return {(p.stem.removeprefix('scaleprotoseg_'), *(r[c] for c in COLUMNS[:5])): r['value'] and float(r['value'])
            for p in TABLES for r in rows(p)}


# -- format -----------------------------------------------------------------------------------------------------------

def test_there_is_a_file_for_every_table():
    assert {p.stem: len(rows(p)) for p in TABLES} == SIZES


@pytest.mark.parametrize('path', TABLES, ids=lambda p: p.stem)
def test_every_row_is_complete(path):
    found = rows(path)
    assert list(found[0]) == COLUMNS and not path.read_bytes().count(b'\r')
    for r in found:
        assert None not in r and None not in r.values() and all(v == v.strip() for v in r.values()), r
        assert r['method'] in {'deeplabv2', 'protoseg', 'scaleprotoseg', *(OTHERS | {'prototype_view'} if path.stem.startswith('prototype_view') else ())} and r['metric'] in METRICS and r['data'] and r['source'], r
        assert r['step'] in {'', 'project', 'pruned', 'grouped'} and (r['method'] != 'deeplabv2' or not r['step']), r
        if r['value']: assert 0 < float(r['value']) < (100 if r['metric'] in PERCENT else 1e6), r
        else: assert 'lost' in r['note'], r
        if r['std']: assert 0 < float(r['std']) < 1, r
    keys = [tuple(r[c] for c in COLUMNS[:5]) for r in found]
    assert len(set(keys)) == len(keys)


def test_what_is_lost_is_known():
    lost = [(p.stem, r['metric']) for p in TABLES for r in rows(p) if not r['value']]
    assert lost == [('scaleprotoseg_table_02', 'reduction_percent')] * 6


# -- agreement --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('data, entropy', [('Pascal VOC val', '0.05'), ('Cityscapes val', '0.05'), ('ADE20K val', '0.25')])
def test_tables_2_7_and_8_tell_of_the_same_model(values, data, entropy):
    for metric in ('prototypes', 'miou'):
        of_table_2 = values['table_02', 'scaleprotoseg', 'grouped', '', data, metric]
        assert values['table_07', 'scaleprotoseg', 'grouped', 'row 2, tau = 0.05', data, metric] == of_table_2
        assert values['table_08', 'scaleprotoseg', 'grouped', f'entropy = {entropy}', data, metric] == of_table_2


def test_second_hand_numbers_are_those_of_the_first_hand(values):
    for city in ('Cityscapes', 'Pascal VOC'):
        assert values['protoseg_main', 'protoseg', 'pruned', '', f'{city} test', 'miou'] == values['table_01', 'protoseg', 'pruned', '', f'{city} test', 'miou']
        for metric in ('miou', 'prototypes'):
            assert values['protoseg_main', 'protoseg', 'pruned', '', f'{city} val', metric] == values['table_02', 'protoseg', 'pruned', '', f'{city} val', metric]


# -- a spot check, typed from the description of the papers -----------------------------------------------------------

TYPED = '''
table_01 deeplabv2 - with_CRF Cityscapes_val miou 71.40
table_01 deeplabv2 - with_CRF_and_COCO_weights Pascal_VOC_test miou 79.70
table_01 protoseg pruned - Pascal_VOC_val miou 71.98
table_01 protoseg pruned - ADE20K_val miou 29.67
table_01 scaleprotoseg grouped - Cityscapes_test miou 68.52
table_01 scaleprotoseg grouped - Pascal_VOC_val miou 71.80
table_01 scaleprotoseg grouped - ADE20K_val miou 34.18
table_02 protoseg project - ADE20K_val prototypes 1756
table_02 protoseg project - ADE20K_val miou 30.89
table_02 protoseg pruned - Cityscapes_val miou 67.23
table_02 protoseg pruned - ADE20K_val prototypes 1161
table_02 scaleprotoseg project - Cityscapes_val miou 70.01
table_02 scaleprotoseg project - Pascal_VOC_val prototypes 252
table_02 scaleprotoseg grouped - ADE20K_val prototypes 1132
table_02 scaleprotoseg grouped - ADE20K_val miou 34.32
table_03 protoseg - - Pascal_VOC_val sparsity 157.67
table_03 scaleprotoseg - - Pascal_VOC_val consistency 38.78
table_03 scaleprotoseg - - Pascal_VOC_val stability 76.30
table_04 protoseg - - Cityscapes_val stability 27.00
table_04 scaleprotoseg - - Cityscapes_val consistency 31.11
table_04 scaleprotoseg - - Cityscapes_val sparsity 12.91
table_05 protoseg - - EM,_split_1 miou 77.63
table_05 scaleprotoseg - - EM,_split_2 miou 79.29
table_06 scaleprotoseg grouped - COCO-Stuff_val miou 34.50
table_06 protoseg project - COCO-Stuff_val miou 32.97
table_07 scaleprotoseg grouped row_1 ADE20K_val group_average 4.53
table_07 scaleprotoseg grouped row_3 Pascal_VOC_val prototypes 126
table_07 scaleprotoseg grouped row_3 Cityscapes_val miou 69.03
table_08 scaleprotoseg grouped entropy_=_0 ADE20K_val prototypes 1405
table_08 scaleprotoseg grouped entropy_=_0 Pascal_VOC_val group_average 5.59
table_08 scaleprotoseg grouped entropy_=_0 Cityscapes_val miou 69.22
table_09 scaleprotoseg grouped entropy_=_0 Cityscapes_val group_overlap 61.65
table_09 scaleprotoseg grouped entropy_=_0.25 ADE20K_val group_overlap 42.74
table_10 protoseg - - ADE20K_val extra_parameters 238200
table_10 scaleprotoseg - - ADE20K_val average_weight 0.437
table_10 scaleprotoseg - - Cityscapes_val iterations_per_second 5.1
table_10 protoseg - - Pascal_VOC_val iterations_per_second 20.7
protoseg_supplement_table_01 protoseg pruned prototypes_per_class_10,_channels_256,_training_1x Pascal_VOC_val miou 65.79
protoseg_supplement_table_01 protoseg pruned prototypes_per_class_50,_channels_64,_training_1x Pascal_VOC_val miou 72.67
protoseg_supplement_table_01 protoseg pruned prototypes_per_class_10,_channels_64,_training_2x Pascal_VOC_val miou 71.63
protoseg_main protoseg project - Pascal_VOC_val prototypes 201
protoseg_main protoseg pruned - Pascal_VOC_test miou 72.92
deeplabv2_reference deeplabv2 - without_CRF Pascal_VOC_val miou 76.35
'''.split('\n')[1:-1]


@pytest.mark.parametrize('line', TYPED)
def test_value(values, line):
    *key, value = line.split(' ')
    assert values[tuple('' if k == '-' else k.replace('_', ' ') if i > 2 and i < 5 else k for i, k in enumerate(key))] == float(value)


def test_standard_deviations():
    std = {(r['method'], r['data']): r['std'] for r in rows(FOLDER / 'scaleprotoseg_table_01.csv') if r['std']}
    assert std == {('protoseg', 'Cityscapes val'): '0.22', ('protoseg', 'Pascal VOC val'): '0.11', ('protoseg', 'ADE20K val'): '0.23',
                   ('scaleprotoseg', 'Cityscapes val'): '0.25', ('scaleprotoseg', 'Pascal VOC val'): '0.38', ('scaleprotoseg', 'ADE20K val'): '0.18'}


# -- hyper-parameters -------------------------------------------------------------------------------------------------

STAGES = {'data', 'model', 'warmup', 'joint', 'finetune', 'prune', 'prune_finetune', 'group_warmup', 'group_joint', 'threshold', 'test'}
QUANTITIES = set('''steps batch accumulate lr_trunk lr_aspp lr_prototypes lr_last lr_groups power decay diversity l1 entropy tau k keep
    crop_height crop_width scale_low scale_high flip inputs scales channels per_class groups classes split_train split_push split_val
    test_height test_width test_shorter_side eval_every batch_norm momentum contrast distance rise'''.split())
DATASETS = {'pascal', 'cityscapes', 'ade20k', 'cocostuff', 'em'}
VIEWS = {'cityscapes-hrnet': 'hrnet', 'cityscapes-segformer': 'segformer', 'ade20k-segformer': 'segformer'}   # of the prototype view, and its parametric network
WORDS = {'split_train', 'split_push', 'split_val', 'inputs'}


@pytest.fixture(scope='module')
def recipes() -> list[dict]: return rows(FOLDER / 'recipes.csv')


@pytest.fixture(scope='module')
def numbers(recipes) -> dict[tuple, str]:
    return {tuple(r[c] for c in ('dataset', 'method', 'variant', 'stage', 'quantity')): r['value'] for r in recipes}


def test_hyper_parameters_use_the_fixed_words(recipes, numbers):
    assert list(recipes[0]) == ['dataset', 'method', 'variant', 'stage', 'quantity', 'value', 'source', 'note']
    assert len(numbers) == len(recipes) > 700
    for r in recipes:
        methods = {VIEWS[r['dataset']], 'prototype_view'} if r['dataset'] in VIEWS else {'deeplabv2', 'unet', 'protoseg', 'scaleprotoseg'}
        assert r['dataset'] in DATASETS | VIEWS.keys() and r['method'] in methods and r['source'], r
        assert r['stage'] in STAGES and r['quantity'] in QUANTITIES, r
        if r['quantity'] not in WORDS and r['value']: assert float(r['value']) >= 0, r
        if not r['value']: assert r['note'], r
    assert {r['quantity'] for r in recipes} == QUANTITIES and {r['stage'] for r in recipes} == STAGES


def test_every_dataset_has_every_method(numbers):
    blackbox = {'em': 'unet'}
    for d in DATASETS:
        methods = {k[1] for k in numbers if k[0] == d and not k[2]}
        assert methods == {blackbox.get(d, 'deeplabv2'), 'protoseg', 'scaleprotoseg'}
        assert {k[3] for k in numbers if k[:3] == (d, 'scaleprotoseg', '')} == STAGES - {'prune', 'prune_finetune'}
        pruning = {'prune', 'prune_finetune'} if d != 'cocostuff' else set()
        assert {k[3] for k in numbers if k[:3] == (d, 'protoseg', '')} == STAGES - {'prune', 'prune_finetune', 'group_warmup', 'group_joint', 'threshold'} | pruning


def test_updates_are_forward_passes_divided_by_their_number_per_update(recipes, numbers):
    checked = 0
    for r in recipes:
        if r['quantity'] == 'steps' and (m := re.search(r'([\d,]+) forward passes in the config, (\d+) an update', r['note'])):
            assert int(r['value']) * int(m[2]) == int(m[1].replace(',', ''))
            assert numbers[r['dataset'], r['method'], r['variant'], r['stage'], 'accumulate'] == m[2]
            checked += 1
    assert checked > 20
    for d in DATASETS - {'em'}:      # every update sees ten images
        for (dataset, _, variant, _, quantity), v in numbers.items():
            if (dataset, variant, quantity) == (d, '', 'batch'): assert int(v) in (2, 10)
    stages = [k[:4] for k in numbers if k[4] == 'batch' and k[0] not in {'em', *VIEWS}]
    assert all(int(numbers[*k, 'batch']) * int(numbers[*k, 'accumulate']) == 10 for k in stages)


HYPER = '''
cityscapes protoseg - warmup steps 3000
cityscapes protoseg - joint steps 30000
cityscapes protoseg - finetune steps 2000
cityscapes protoseg - prune_finetune steps 2000
cityscapes protoseg - prune k 6
cityscapes protoseg - prune keep 3
cityscapes protoseg - model per_class 10
cityscapes scaleprotoseg - data crop_height 513
cityscapes scaleprotoseg - group_warmup steps 2000
cityscapes scaleprotoseg - group_joint steps 30000
cityscapes scaleprotoseg - group_joint l1 1e-3
cityscapes scaleprotoseg - test test_width 2048
pascal protoseg - data crop_width 321
pascal protoseg - finetune steps 6000
pascal scaleprotoseg - joint lr_trunk 2.5e-5
pascal scaleprotoseg - joint lr_prototypes 2.5e-4
pascal scaleprotoseg - finetune lr_last 1e-5
pascal scaleprotoseg - group_joint lr_last 2.5e-4
pascal scaleprotoseg - group_joint entropy 0.05
pascal scaleprotoseg - threshold tau 0.05
pascal scaleprotoseg - test test_height 513
pascal protoseg no_diversity joint diversity 0
pascal protoseg joint2x joint steps 60000
pascal protoseg d256 model channels 256
ade20k protoseg - model per_class 12
ade20k protoseg - warmup steps 6000
ade20k scaleprotoseg - joint steps 60000
ade20k scaleprotoseg - finetune steps 4000
ade20k scaleprotoseg - group_joint steps 30000
ade20k scaleprotoseg - joint l1 1e-5
ade20k scaleprotoseg - group_joint l1 1e-4
ade20k scaleprotoseg - group_warmup entropy 0.25
ade20k scaleprotoseg - data scale_high 2.0
ade20k scaleprotoseg - test test_shorter_side 512
cocostuff protoseg - joint steps 100000
cocostuff protoseg - joint batch 10
cocostuff scaleprotoseg - joint eval_every 2000
cocostuff scaleprotoseg - model classes 182
cocostuff scaleprotoseg - group_joint entropy 0.25
em protoseg - joint lr_trunk 1e-4
em protoseg - joint batch_norm 1
em scaleprotoseg - group_joint lr_groups 5e-5
em scaleprotoseg - warmup steps 0
em protoseg supplement joint decay 0
em protoseg supplement model scales 1
cocostuff deeplabv2 sgd joint lr_trunk 2.5e-4
cocostuff deeplabv2 sgd joint batch 5
'''.split('\n')[1:-1]


@pytest.mark.parametrize('line', HYPER)
def test_hyper_parameter(numbers, line):
    *key, value = line.split(' ')
    assert float(numbers[tuple('' if k == '-' else k for k in key)]) == float(value)


def test_words(numbers):
    for d, train, inputs in (('pascal', 'train_aug', '0.5 0.75'), ('cityscapes', 'train', ''), ('ade20k', 'train', ''), ('cocostuff', 'train', '0.5 0.75')):
        for m in ('protoseg', 'scaleprotoseg'):
            assert numbers[d, m, '', 'data', 'split_train'] == train and numbers[d, m, '', 'data', 'split_push'] == 'train'
            assert numbers[d, m, '', 'model', 'inputs'] == inputs


@pytest.mark.parametrize('experiment, table, classifier', [('ade20k-segformer', 'prototype_view_supplement_table_02', 0),
                                                          ('cityscapes-segformer', 'prototype_view_supplement_table_01', 131)])
def test_the_networks_of_the_prototype_view_are_as_large_as_published(experiment, table, classifier):
    """SegFormer-B5's published count is of 150 classes, Cityscapes has 19: 131 more rows of 768 weights and a bias."""
    from scaleprotoseg.measures import parameter_table
    from scaleprotoseg.report import compared, published
    box, view = parameter_table(compared(experiment), published(table).assign(setting='')).to_dict('records')
    assert round(box['learned'] + classifier * 769 / 1e6, 1) == box['published'] and round(view['learned'], 1) == view['published']
    assert box['stored'] == 0 < view['stored'] and view['learned'] < box['learned']
