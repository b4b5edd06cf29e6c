"Finished stages with random weights, for tests that load them."
import json
from dataclasses import asdict
from pathlib import Path

import torch

from scaleprotoseg.model import build_model, save_model
from scaleprotoseg.partscapes import PartScapes
from scaleprotoseg.projection import Projection, save_sheet, trace
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.runs import run_folder
from scaleprotoseg.transforms import reduce_labels

DATA = PartScapes('train', size=(64, 96), n=2)


def write_stage(folder: Path, head='groups', scales=4, backbone=None, recipe='smoke/scaleprotoseg', finished=True, pruned=()):
    "A stage folder with random weights and, for prototype heads, real patches."
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    kind = dict(activation='unit', similarity='cosine') if head == 'nearest' else dict(activation='sigmoid')
    config = dict(backbone=backbone or dict(name='deeplabv2', arch='resnet18'), **kind, head=head,
                  classes=10, scales=scales, channels=8, per_class=2, groups=3, labels=DATA.labels.to_dict(),
                  recipe=recipe, stage=folder.name)
    model = build_model(config).eval()
    if model.prototypes is not None:
        for conv in model.backbone.aspp.convs: conv.weight.data.mul_(20)
        if head != 'nearest': model.head.last.data.uniform_(-1, 1)
        projection = Projection(model.prototypes)
        with torch.no_grad():
            for i in range(len(DATA)):
                out = model(DATA[i].image[None], ('features', 'distances', 'similarities'))
                projection.update(i, out.features, out.distances, out.similarities,
                                  reduce_labels(DATA[i].label[None], out.logits.shape[-2:]))
        projection.apply_(model.prototypes)
        for key in pruned: model.prototypes.alive[key] = False
        if head == 'groups':
            model.head.project_(model.prototypes.alive)
            model.head.threshold_(0.1)
        sources, tiles = trace(projection, DATA)
        save_sheet(tiles, folder / 'patches.webp')
        (folder / 'prototypes.json').write_text(json.dumps([asdict(s) for s in sources]))
    save_model(model, config, folder)
    if finished: (folder / 'metrics.json').write_text('{}')
    return folder


def finish(runs, experiment, method, stage, seed=0, miou=0.5, provenance=True, variant='', finished='2030-01-02T03:04:05+00:00', **prototypes):
    "The two JSON files of a finished stage; returns its folder."
    recipe = find_recipe(experiment, method, variant)
    folder = run_folder(runs, recipe, seed, stage)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.json').write_text(json.dumps({
        'stage': stage, 'miou': miou, 'accuracy': .75, 'iou': {'a': None}, 'prototypes': prototypes,
        'memory_mb': {'process': 900}}))
    if provenance:
        (folder / 'provenance.json').write_text(json.dumps({
            'commit': 'c' * 40, 'recipe': recipe.digest(stage), 'seconds': 30.0, 'device': 'cpu, 2 threads',
            'finished': finished,
            'data': {'val': {'dataset': recipe.data.dataset, 'images': 4}}}))
    return folder


def finish_demo(folder):
    "Of the demo: ScaleProtoSeg three times, two stages of ProtoSeg, no black box."
    for seed, miou in enumerate((.50, .52, .57)):
        finish(folder, 'demo', 'scaleprotoseg', 'threshold', seed, miou, alive=100, active=60 + seed, total=120)
    for stage in ('finetune', 'prune_finetune'): finish(folder, 'demo', 'protoseg', stage, 0, .48, alive=90, total=100)
    return folder
