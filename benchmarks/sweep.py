"""What the papers' experiments cost: trainings, images, floating-point operations, and hours of a device.

`python benchmarks/sweep.py` counts the operations of every stage as the recipes describe it, on tensors without values, so it
needs no data and no GPU. A stage that several variants or experiments share is counted once per seed. Hours follow from the
operations per second that `network.py` measured in a joint training step, and from a round number."""
import json

import torch
import typer
from network import flops
from sizes import OUT, SIZES, save
from torch._subclasses.fake_tensor import FakeTensorMode

from scaleprotoseg.catalogue import CATALOGUE
from scaleprotoseg.model import build_model
from scaleprotoseg.recipes import Recipe, Stage, recipes_of
from scaleprotoseg.training import mean_losses

PAPERS = {'EM': ('em', 'em-ablations', 'em-supplement'), 'Pascal': ('pascal', 'pascal-ablations'), 'ADE20K': ('ade20k', 'ade20k-ablations'),
          'Cityscapes': ('cityscapes', 'cityscapes-ablations'), 'COCO-Stuff': ('cocostuff', 'cocostuff-ablations')}
ROUND = 100.                          # TFLOP/s
_counted: dict[str, int] = {}         # many stages ask for the same pass


def counted(recipe: Recipe, stage: Stage, classes: int, size: tuple[int, int], training: bool) -> int:
    "Operations of a forward pass of one image, or of a training pass of one batch."
    train = stage.train
    key = json.dumps([recipe.model, stage.head, classes, size, training and [sorted(train.lr), train.batch, bool(train.diversity)]], sort_keys=True)
    if key not in _counted:
        backbone = {k: None if k == 'weights' else v for k, v in recipe.model['backbone'].items()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build_model({**recipe.model, 'backbone': backbone, 'head': stage.head, 'classes': classes})
            _counted[key] = flops(training_pass(model, train, size) if training else forward_pass(model, size))
    return _counted[key]


def training_pass(model, train, size):
    x, y = torch.rand(train.batch, 3, *size), torch.zeros(train.batch, *size, dtype=torch.long)
    want = ('distances',) * bool(train.diversity) + ('features', 'similarities') * bool(train.momentum)
    model.train_only_(train.lr, train.batch_norm)
    def step():
        outputs = model.outputs(x, want)
        nearest = [torch.zeros(len(x), *out.logits.shape[-2:], dtype=torch.long) for out in outputs] if train.momentum else None   # which one costs the same
        sum(mean_losses(outputs, y, model, train, assigned=nearest).values()).backward()
    return step


def forward_pass(model, size):
    everything = ('similarities',) if model.prototypes is not None else ()     # else values decide which prototypes are computed
    return torch.no_grad()(lambda: model(torch.rand(1, 3, *size), everything))


def cost(dataset: str, recipe: Recipe, stage: Stage) -> dict[str, float]:
    "Operations of one run of a stage, by what they are for, and the images that its training sees."
    size, data, train = SIZES[dataset], recipe.data, stage.train
    card = next(c for c in CATALOGUE.values() if (c.dataset or c.name) == data.dataset)
    images = {role: card.splits[options['split']] for role, options in data.splits.items()}
    as_seen = tuple(data.evaluation.resize(torch.empty(1, 1, *size.image)).shape[-2:])
    validations = 1 if not train or not train.eval_every else -(-train.steps // train.eval_every)
    found = {'validation': validations * images['val'] * counted(recipe, stage, size.classes, as_seen, False)}
    if stage.kind in ('project', 'prune'): found['projection'] = images['push'] * counted(recipe, stage, size.classes, size.image, False)
    if not train: return found
    if train.views: return found | {'training': train.views * images['train'] * counted(recipe, stage, size.classes, data.crop, False)}
    passes = train.steps * train.accumulate
    return found | {'training': passes * counted(recipe, stage, size.classes, data.crop, True), 'images': passes * train.batch}


def stages(experiments: tuple[str, ...]) -> dict[tuple, tuple[Recipe, Stage]]:
    "What has to be run, by what tells results apart: digest and seed."
    return {(recipe.digest(stage.name), seed): (recipe, stage) for e in experiments for recipe in recipes_of(e) for stage in recipe.stages for seed in recipe.seeds}


def measured() -> dict[str, float]:
    "Operations per second of a joint training step, in TFLOP/s, by the device that `network.py` was run on."
    speeds = {}
    for path in sorted(OUT.glob('network*.json')):
        made = json.loads(path.read_text())
        rows = {r['work']: r for r in made['rows']}
        step = rows.get('training step', {})
        if 'GFLOP, ScaleProtoSeg, joint' in step: speeds[made['device']] = step['GFLOP, ScaleProtoSeg, joint'] / step['ms']['ScaleProtoSeg, joint']
    return speeds


def main():
    "A row per dataset, and their sum."
    speeds, rows = {f'sustained {ROUND:.0f} TFLOP/s': ROUND, **measured()}, []
    for dataset, experiments in PAPERS.items():
        runs = stages(experiments)
        total = dict.fromkeys(('training', 'projection', 'validation', 'images'), 0.)
        for recipe, stage in runs.values():
            for name, x in cost(dataset, recipe, stage).items(): total[name] += x
        rows.append({'size': dataset, 'work': ', '.join(experiments), 'trainings': sum(len(r.seeds) for e in experiments for r in recipes_of(e)), 'stages': len(runs),
                     'million images': total.pop('images') / 1e6, **{f'EFLOP, {k}': v / 1e18 for k, v in total.items()}})
    rows.append({'size': 'all', 'work': 'the papers', **{k: sum(r[k] for r in rows) for k in rows[0] if k not in ('size', 'work')}})
    for r in rows:
        everything = 1e18 * sum(v for k, v in r.items() if k.startswith('EFLOP'))
        r |= {f'hours, {name}': everything / (1e12 * speed) / 3600 for name, speed in speeds.items()}
    save('sweep', rows)


if __name__ == '__main__': typer.run(main)
