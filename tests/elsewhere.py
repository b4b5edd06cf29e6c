"""A device that is not there. What it holds lies in CPU tensors, and where tensors of two devices meet that must not, it refuses.

    python elsewhere.py train RUNS WORK
    python elsewhere.py notebooks RUNS WORK NOTEBOOK ...
    python elsewhere.py miniatures RUNS WORK EXPERIMENT/METHOD[-VARIANT] ...

The first trains the smoke experiment on it, continues a stopped training and uses a finished one, the second runs paper notebooks on
it, the third other recipes as `test_methods` does; all print what came out as JSON. Scripts, because a device cannot be taken away
again. What a GPU cannot do or does in its own way (operators that it lacks, rounding, half precision, memory) is not seen here."""
import json
import os
import re
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self): return [torch.bfloat16]


_setup_privateuseone_for_python_backend('elsewhere', Backend())
DEVICE = torch.device('elsewhere', 0)
aten = torch.ops.aten
PUT = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
INDEX = {aten.index.Tensor, *PUT}                                                # their indices may be on the CPU
NUMBERS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor, *PUT}   # take a number of the CPU, as pointwise operators do
MOVES = {aten._to_copy.default, aten.copy_.default}
ran = 0                                                                          # operators on this device so far


class Elsewhere(torch.Tensor):
    "A tensor of `DEVICE`; `held` is the CPU tensor with its values."
    @staticmethod
    def __new__(cls, held):
        out = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                  dtype=held.dtype, device=DEVICE)
        out.held = held
        return out

    def __repr__(self): return f'Elsewhere({self.held})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


def is_elsewhere(device): return device is not None and torch.device(device).type == DEVICE.type


def strangers(func, args, kwargs, tensors):
    "Tensors of the CPU that an operator on this device must not be given: all but indices, and numbers that are only read."
    if func in MOVES: return []
    named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    written = {id(x) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write for x in tree_leaves(named.get(a.name))}
    indices = {id(x) for x in args[1]} if func in INDEX and isinstance(args[0], Elsewhere) else set()
    numbers = torch.Tag.pointwise in func.tags or func in NUMBERS
    free = lambda x: isinstance(x, Elsewhere) or id(x) in indices or numbers and not x.dim() and id(x) not in written
    return [x for x in tensors if not free(x)]


def dispatch(func, args, kwargs):
    "Run an operator on what the tensors hold; RuntimeError where devices must not meet."
    global ran
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away, place = [x for x in tensors if isinstance(x, Elsewhere)], kwargs.get('device')
    result_away = is_elsewhere(place) if place is not None else bool(away)
    if not away and not result_away: return func(*args, **kwargs)
    if not result_away and torch.device(place).type != 'cpu': raise NotImplementedError(f'{func} from {DEVICE} to {place}')
    if away and (wrong := strangers(func, args, kwargs, tensors)):
        raise RuntimeError(f'{func}: expected all tensors on one device, but {[tuple(x.shape) for x in wrong]} are on the CPU')
    if kwargs.get('generator') is not None: raise RuntimeError(f'{func}: expected a generator of {DEVICE}, not of the CPU')
    if torch.Tag.inplace_view in func.tags: raise NotImplementedError(f'{func}: the shape of a tensor of {DEVICE} is fixed')
    ran += 1
    kwargs = {k: v for k, v in kwargs.items() if k not in ('device', 'pin_memory')}
    out = func(*tree_map_only(Elsewhere, lambda x: x.held, args), **tree_map_only(Elsewhere, lambda x: x.held, kwargs))
    if func is aten.copy_.default: return args[0]
    if not result_away: return out
    same = {id(x.held): x for x in away}
    return tree_map_only(torch.Tensor, lambda x: same[id(x)] if id(x) in same else Elsewhere(x), out)


class Factories(TorchDispatchMode):
    "Operators without tensors make theirs elsewhere if they are told to."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


class Below(TorchFunctionMode):
    "What torch does below its operators, where `Factories` cannot see it."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, own = kwargs or {}, bool(args) and isinstance(args[0], Elsewhere)
        if func is torch.Tensor.new_tensor and own:
            func, args, kwargs = torch.tensor, args[1:], {'dtype': args[0].dtype, 'device': DEVICE, **kwargs}
        if func in (torch.tensor, torch.as_tensor) and is_elsewhere(kwargs.get('device')):
            return func(*args, **{k: v for k, v in kwargs.items() if k != 'device'}).to(DEVICE)
        if own and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert {DEVICE} tensor to numpy; use Tensor.cpu() first")
        if own and func is torch.Tensor.tolist: return args[0].held.tolist()
        if own and func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.as_tensor(i) if isinstance(i, (list, np.ndarray)) else i for i in at), *args[2:])
        return func(*args, **kwargs)


def pretend():
    "The package has this device from now on, and takes it for `auto`. Before the modules that ask for a device are imported."
    import scaleprotoseg.model as model
    there = model.pick_device
    model.pick_device = lambda name='auto': DEVICE if name == 'auto' or is_elsewhere(name) else there(name)
    torch.accelerator.synchronize = lambda device=None: None
    import scaleprotoseg.training as training
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators import CPUAccelerator
    from lightning_fabric.strategies import SingleDeviceStrategy

    class Accelerator(CPUAccelerator):
        def setup_device(self, device): pass
    fabric = training.make_fabric
    training.make_fabric = lambda device, precision, devices=0: \
        Fabric(accelerator=Accelerator(), strategy=SingleDeviceStrategy(device=DEVICE)) if is_elsewhere(device) else fabric(device, precision, devices)


def refusals():
    "Whether each mistake is refused, by name."
    here, there, index, number = torch.rand(3), torch.rand(3, device=DEVICE), torch.tensor([0, 1]), torch.zeros(())
    tries = {
        'sum': lambda: here + there, 'matrix': lambda: there @ here, 'cat': lambda: torch.cat([here, there]), 'where': lambda: torch.where(there > 0, here, there),
        'add to': lambda: there.add_(here), 'add to a number': lambda: number.add_(there.sum()), 'out': lambda: torch.add(there, there, out=here),
        'stack numbers': lambda: torch.stack([there[0], number]), 'index': lambda: here[there > 2], 'put': lambda: there.index_put_((index,), here[:2]),
        'gather': lambda: there.gather(0, index), 'generator': lambda: there.normal_(generator=torch.Generator()),
        'numpy': there.numpy, 'asarray': lambda: np.asarray(there)}
    return {name: bool(said(mistake)) for name, mistake in tries.items()}


def allowed():
    "How each thing that is no mistake failed, by name."
    there, index, number = torch.rand(3, device=DEVICE), torch.tensor([0, 1]), torch.ones(())
    def put(): there[index] = number
    tries = {'number': lambda: there.add_(number), 'index': lambda: there[index], 'mask': lambda: there[torch.tensor([True, False, True])], 'put': put,
             'fill': lambda: there.masked_fill(there > 0, number), 'copy': lambda: torch.zeros(3).copy_(there), 'item': lambda: float(there.sum()),
             'list': there.tolist, 'numpy': lambda: there.cpu().numpy(), 'meta': lambda: torch.empty(3, device='meta').device.type == 'meta' or 1 / 0}
    return {name: said(act) for name, act in tries.items()}


def scores(folder): return {k: v for k, v in json.loads((folder / 'metrics.json').read_text()).items() if k not in ('memory_mb', 'seconds_training')}


def trained(out, method, device, variant=''):
    "The scores of every stage."
    from scaleprotoseg.training import run_method
    return {f.name: scores(f) for f in run_method('smoke', method, variant, out=out, device=str(device))}


def continued(out, method, stage):
    "The scores of a stage that is asked to stop in each of its updates, and how often it was."
    import scaleprotoseg.training as training
    losses, sessions = training.stage_losses, 0
    def ask(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses(*args, **kwargs)
    with mock.patch.object(training, 'stage_losses', ask), mock.patch.object(training, 'READ_EVERY', 1):
        while True:
            try: return scores(training.run_stage('smoke', method, stage, out=out, device=str(DEVICE))), sessions
            except training.Interrupted: sessions += 1


def run_notebook(path, **values):
    "Every cell in one namespace, with other parameters."
    import matplotlib.pyplot as plt
    from IPython.display import display
    space = {'__name__': '__main__', 'display': display}
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        exec(compile(''.join(cell['source']), f'{path.name} {cell["id"]}', 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', []): space |= {k: v for k, v in values.items() if k in space}
    plt.close('all')


def said(f, *args, **kwargs):
    "Empty, or how it failed."
    try: f(*args, **kwargs)
    except Exception: return traceback.format_exc()[-3000:]
    return ''


def use(folder, work):
    "Predict, explain, evaluate and export with a finished stage."
    from scaleprotoseg.cli import evaluate, export
    from scaleprotoseg.partscapes import PartScapes
    from scaleprotoseg.predict import load
    image = PartScapes('val', size=(64, 96), n=1)[0].image
    one, other = (load(folder, device=d) for d in (DEVICE, 'cpu'))
    assert one.device == DEVICE and np.array_equal(one.predict(image), other.predict(image))
    assert one.explain(image, at=(9, 9)).to_dict() == other.explain(image, at=(9, 9)).to_dict()
    for name in (str(DEVICE), 'cpu'): evaluate(folder, device=name, output=work / f'{name.split(":")[0]}.json')
    assert (work / 'elsewhere.json').read_text() == (work / 'cpu.json').read_text()
    export(folder, work / 'exported', split='val', device=str(DEVICE))


def train(runs, work):
    "Mistakes and what is none; scores there and here, by method and stage; how using a finished stage failed; a continued training."
    from scaleprotoseg.recipes import recipes_of
    found = {'refused': refusals(), 'allowed': allowed()}
    found['elsewhere'] = {r.short_name: trained(runs, r.method, DEVICE, r.variant) for r in recipes_of('smoke')}
    found['here'] = {method: trained(work / 'here', method, 'cpu') for method in ('pretrain', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view')}
    found['use'] = said(use, runs / 'smoke/scaleprotoseg/seed0/threshold', work)
    shutil.copytree(runs / 'smoke/pretrain', work / 'continued/smoke/pretrain')
    found['continued'], found['sessions'] = continued(work / 'continued', 'prototype_view', 'joint')
    return found


def notebooks(runs, work, *names):
    "How each failed, and how many operators it ran on the device."
    found, values = {}, dict(experiment='smoke', runs=str(runs), out=str(work / 'figures'))
    for name in names:
        before = ran
        found[name] = said(run_notebook, Path('nbs/paper') / f'{name}.ipynb', **values), ran - before
    return found


def miniatures(runs, work, *names):
    "How each failed."
    from test_methods import miniature, shrunk

    from scaleprotoseg.recipes import add_recipes, find_recipe
    from scaleprotoseg.training import run_method
    found = {}
    for name in names:
        experiment, method, variant = re.fullmatch(r'(.*)/([^-]*)-?(.*)', name).groups()
        recipe = replace(shrunk(find_recipe(experiment, method, variant)), experiment=experiment + '-mini')
        add_recipes(recipe)
        if not (data := work / recipe.data.dataset).exists(): miniature(recipe.data.dataset, data)
        found[name] = said(run_method, recipe.experiment, method, variant, out=runs, data_root=data, device=str(DEVICE))
    return found


if __name__ == '__main__':
    os.environ.setdefault('MPLBACKEND', 'agg')
    pretend()
    with Factories(), Below():
        print(json.dumps({'train': train, 'notebooks': notebooks, 'miniatures': miniatures}[sys.argv[1]](*map(Path, sys.argv[2:4]), *sys.argv[4:])))
