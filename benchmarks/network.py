"""The whole network, DeepLabv2 on ResNet-101 at 513×513: backbone and heads apart, a training step, memory, FLOPs.

`python benchmarks/network.py [--dataset Cityscapes] [--threads N] [--device cuda] [--precision bf16] [--batch N]`
On a GPU the same rows at a batch that fills it; `training step` is forward, losses, backward and the optimiser."""
import statistics
import sys
from contextlib import nullcontext

import torch
import typer
from sizes import CHANNELS, GROUPS, PER_CLASS, SCALES, SIZES, above_start, in_own_process, in_turns, random, row, save, squares
from torch.utils.flop_counter import FlopCounterMode

from scaleprotoseg.model import Model, build_model
from scaleprotoseg.recipes import Train
from scaleprotoseg.training import make_optimizer, stage_losses

RATES = dict(trunk=2.5e-5, aspp=2.5e-4, prototypes=2.5e-4, last=1e-5)


def network(dataset: str, head: str, arch: str = 'resnet101', device: str = 'cpu') -> Model:
    "Backbone and head, untrained: `groups`, `stage 1` of them, ProtoSeg's `linear`, or the cost baseline `pixel`."
    torch.manual_seed(0)
    size, protoseg = SIZES[dataset], head == 'linear'
    config = dict(backbone=dict(name='deeplabv2', arch=arch), head='linear' if head == 'stage 1' else head,
                  activation='sigmoid', classes=size.classes, scales=1 if protoseg else SCALES, channels=CHANNELS,
                  per_class=size.protoseg if protoseg else PER_CLASS, groups=GROUPS)
    return build_model(config).to(device)


def step(model: Model, image, label, optimizer, train: Train, autocast):
    "A joint training step."
    def run():
        optimizer.zero_grad()
        with autocast():
            out = model(image, want=['distances'] if model.prototypes is not None else ())
            losses = stage_losses(out, label, model, train)
        sum(losses.values()).backward()
        optimizer.step()
    return run


def training(dataset, head, pixels, batch, device, autocast, way: str = ''):
    "A function that takes one step of a head's joint stage, as training does it or in another way."
    model = network(dataset, head, device=device).train()
    has = model.prototypes is not None
    lr = {k: v for k, v in RATES.items() if k != 'prototypes' or has}
    train = Train(steps=1, lr=lr, diversity=0.25 if has else 0., l1=1e-4 if has else 0.)
    model.train_only_(train.lr)
    image = random(batch, 3, pixels, pixels).to(device)
    label = torch.stack([squares(SIZES[dataset].present, (pixels, pixels), 40, i) for i in range(batch)]).to(device)
    if way == 'compiled': model.backbone.compile()
    if way == 'contiguous': model = model.to(memory_format=torch.contiguous_format)
    return step(model, image, label, make_optimizer(model, train), train, autocast)


def head_and_losses(dataset, pixels, batch, device, autocast):
    "What a joint step of ScaleProtoSeg does after the backbone: forward, losses, and backward to the features."
    model = network(dataset, 'stage 1', device=device).train()
    train, cells = Train(steps=1, lr=RATES, diversity=0.25, l1=1e-4), -(-pixels // 8)
    features = random(batch, SCALES, CHANNELS, cells, cells).to(device).requires_grad_()
    label = torch.stack([squares(SIZES[dataset].present, (pixels, pixels), 40, i) for i in range(batch)]).to(device)
    def run():
        features.grad = None
        with autocast(): losses = stage_losses(model.score(features, ['distances']), label, model, train)
        sum(losses.values()).backward()
    return run


def inference(dataset, pixels, batch, device, autocast):
    "The parts and the wholes of a prediction."
    models = {'grouped': network(dataset, 'groups', device=device), 'ProtoSeg': network(dataset, 'linear', device=device),
              'linear': network(dataset, 'pixel', device=device)}
    for m in models.values(): m.eval()
    image = random(batch, 3, pixels, pixels).to(device)
    def quiet(f):
        def run():
            with torch.no_grad(), autocast(): return f()
        return run
    features = quiet(lambda: models['grouped'].features(image))()
    return ({**{name: quiet(lambda m=m: m(image)) for name, m in models.items()},
             'backbone': quiet(lambda: models['grouped'].backbone(image))},
            {'grouped head': quiet(lambda: models['grouped'].score(features)), 'linear head': quiet(lambda: models['linear'].score(features))})


def flops(f) -> int:
    "Floating-point operations of matrix products and convolutions."
    def product(_, a, b, out_shape=None, **__): return 2 * a[0] * a[1] * a[2] * b[2]      # in place, which the counter does not know
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: product}) as counter: f()
    return counter.get_total_flops()


def memory(dataset: str, head: str, work: str, pixels: str) -> float:
    "MB above what the model needs, in this process."
    torch.set_num_threads(1)
    if work == 'step': return above_start(training(dataset, head, int(pixels), 1, 'cpu', nullcontext))
    model, (H, W) = network(dataset, head, 'resnet18').eval(), SIZES[dataset].image
    image = random(1, 3, H, W)
    from scaleprotoseg.evaluation import segment
    return above_start(lambda: segment(model, image))


def main(dataset: str = 'Cityscapes', pixels: int = 513, batch: int = 1, threads: int = 0, device: str = 'cpu', precision: str = '32',
         repeats: int = 3, memories: bool = True, steps: bool = True):
    "Inference, training step, memory."
    if threads: torch.set_num_threads(threads)
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if precision == 'bf16' else nullcontext
    wholes, heads = inference(dataset, pixels, batch, device, autocast)
    counted = {f'GFLOP {k}': flops(f) / 1e9 for k, f in {**wholes, **heads}.items() if k in ('backbone', 'grouped head', 'linear head')}
    seconds = in_turns({**wholes, **heads}, repeats, 600)
    share = statistics.median(seconds['grouped head']) / statistics.median(seconds['backbone'])
    title = f'{dataset}, {pixels}×{pixels}, batch {batch}, {precision}'
    rows = [row(title, 'inference', seconds, '', 'linear', 'grouped', **{'grouped head/backbone': share}, **counted,
                **{'grouped it/s : ProtoSeg it/s': statistics.median(seconds['ProtoSeg']) / statistics.median(seconds['grouped'])})]
    if steps:
        forms = {name: training(dataset, head, pixels, batch, device, autocast)
                 for name, head in {'ScaleProtoSeg, joint': 'stage 1', 'ProtoSeg, joint': 'linear', 'linear': 'pixel'}.items()}
        counted = {f'GFLOP, {name}': flops(f) / 1e9 for name, f in forms.items() if name != 'linear'}
        seconds = in_turns({**forms, 'head + losses': head_and_losses(dataset, pixels, batch, device, autocast)}, repeats, 600)
        share = statistics.median(seconds['head + losses']) / statistics.median(seconds['ScaleProtoSeg, joint'])
        rows.append(row(title, 'training step', seconds, '', 'linear', 'ScaleProtoSeg, joint', **{'head + losses/step': share}, **counted))
        ways = {way or 'as it is': training(dataset, 'stage 1', pixels, batch, device, autocast, way) for way in ('', 'contiguous', 'compiled')}
        seconds = in_turns(ways, repeats, 600)
        plain, *others = (statistics.median(s) for s in seconds.values())
        rows.append(row(title, 'joint step, other ways', seconds, **{f'{way}/as it is': x / plain for way, x in zip(list(ways)[1:], others)}))
    if memories and device == 'cpu':
        for name in ('Cityscapes', 'ADE20K'):
            mb = {head: in_own_process(__file__, 'memory', name, head, 'evaluation', '0') for head in ('groups', 'linear', 'pixel')}
            rows.append({'size': f'{name}, ResNet-18, {"×".join(map(str, SIZES[name].image))}', 'work': 'evaluation, MB', **mb, 'groups/pixel': mb['groups'] / mb['pixel']})
        if steps:
            mb = {head: in_own_process(__file__, 'memory', dataset, head, 'step', str(pixels)) for head in ('stage 1', 'pixel')}
            rows.append({'size': title, 'work': 'training step, MB', **mb, 'stage 1/pixel': mb['stage 1'] / mb['pixel']})
    save('network', rows, device)


if __name__ == '__main__':
    if sys.argv[1:2] == ['memory']: print(memory(*sys.argv[2:]))
    else: typer.run(main)
