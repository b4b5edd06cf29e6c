"A model in one file: other runtimes give its numbers, its explanation and what they mean; wrong wishes are refused."
import json

import pytest
import torch
from saved import DATA, write_stage
from typer.testing import CliRunner

from scaleprotoseg import deploy
from scaleprotoseg.cli import app
from scaleprotoseg.deploy import description, export_model
from scaleprotoseg.predict import load


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    runs = tmp_path_factory.mktemp('runs') / 'smoke'
    return {'groups': write_stage(runs / 'scaleprotoseg/seed0/threshold'), 'linear': write_stage(runs / 'protoseg/seed0/finetune', 'linear', 1, recipe='smoke/protoseg'),
            'pixel': write_stage(runs / 'linear/seed0/joint', 'pixel', 1, recipe='smoke/linear'),
            'nearest': write_stage(runs / 'prototype_view/seed0/joint', 'nearest', 1, recipe='smoke/prototype_view')}


def by_hand(facts, evidence):
    "Logits from what a deployed file gives and says."
    last = torch.tensor(facts['last'])                                     # (C, C, E)
    if facts['additive']: return torch.einsum('tce,bcehw->bthw', last, evidence)
    own = last.diagonal().T                                                # (C, E): other classes have no say
    assert torch.equal(last, torch.diag_embed(own.T).permute(1, 2, 0))
    return (evidence * own[..., None, None]).masked_fill((own == 0)[..., None, None], -torch.inf).amax(2)


@pytest.mark.parametrize('head', ['groups', 'linear', 'pixel', 'nearest'])
def test_onnx_takes_images_of_any_size_and_explains_them(stages, head, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (extra `deploy`)')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed (extra `deploy`)')
    predictor = load(stages[head])
    before = {k: v.clone() for k, v in predictor.model.state_dict().items()}
    made = export_model(predictor, tmp_path / 'new/model.onnx')
    assert made['outputs'] == ['logits', 'evidence'][:1 + (head != 'pixel')] and max(made["deviation"].values()) < 1e-3
    session = onnxruntime.InferenceSession(made['file'], providers=['CPUExecutionProvider'])
    facts = json.loads(session.get_modelmeta().custom_metadata_map['scaleprotoseg'])
    assert facts == json.loads(json.dumps(description(predictor))) and facts['labels']['names'][9] == 'zebra'
    for image in (DATA[0].image[None], torch.rand(1, 3, 71, 130)):
        logits, *evidence = (torch.from_numpy(x) for x in session.run(None, {'image': image.numpy()}))
        with torch.no_grad(): want = predictor.model(image).logits
        for got in (logits, *(by_hand(facts, x) for x in evidence)):
            assert (got - want).abs().max() < 1e-3 * want.abs().max()      # groups grow to 10^4 where a prototype is met
    assert all(torch.equal(v, before[k]) for k, v in predictor.model.state_dict().items())
    assert all(p.requires_grad for p in predictor.model.parameters())


def test_a_program_of_torch_for_one_size(stages, tmp_path):
    predictor = load(stages['groups'])
    done = CliRunner().invoke(app, ['deploy', str(stages['groups']), str(tmp_path / 'model.pt2'), '--size', '64', '96'])
    assert done.exit_code == 0 and 'logits within' in done.stdout, done.output
    extra = {'scaleprotoseg': ''}
    with open(tmp_path / 'model.pt2', 'rb') as f: program = torch.export.load(f, extra_files=extra).module()
    logits, evidence = program(DATA[0].image[None])
    with torch.no_grad(): out = predictor.model(DATA[0].image[None], ['groups'])
    torch.testing.assert_close(logits, out.logits), torch.testing.assert_close(evidence, out.groups)
    assert json.loads(extra['scaleprotoseg'])['evidence'] == ['group 1', 'group 2', 'group 3']


def test_a_file_of_nan_is_not_kept(stages, tmp_path, monkeypatch):
    write, run = deploy.WRITERS['.pt2']
    monkeypatch.setitem(deploy.WRITERS, '.pt2', (write, lambda file, image: [x * float('nan') for x in run(file, image)]))
    with pytest.raises(ValueError, match='would give other logits than the model: nan'): export_model(load(stages['groups']), tmp_path / 'model.pt2', (64, 96))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name, size, match', [('model.tflite', None, 'expected a name that ends in .onnx or .pt2'), ('model', (64, 96), 'expected a name'),
                                               ('model.pt2', None, 'give their height and width')])
def test_wrong_wishes_are_refused(stages, tmp_path, name, size, match):
    with pytest.raises(ValueError, match=match): export_model(load(stages['groups']), tmp_path / name, size)
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_numbers_is_not_kept(stages, tmp_path, monkeypatch):
    write, run = deploy.WRITERS['.pt2']
    monkeypatch.setitem(deploy.WRITERS, '.pt2', (write, lambda file, image: [1.01 * x for x in run(file, image)]))
    (tmp_path / 'model.pt2').write_text('an earlier file')
    with pytest.raises(ValueError, match='would give other logits than the model: 0.01'): export_model(load(stages['groups']), tmp_path / 'model.pt2', (64, 96))
    assert [p.read_text() for p in tmp_path.iterdir()] == ['an earlier file']


def test_a_size_that_cannot_be_and_a_file_that_cannot_take_every_size_are_said(stages, tmp_path):
    with pytest.raises(ValueError, match='images of 0 x 7 pixels'): export_model(load(stages['linear']), tmp_path / 'model.pt2', (0, 7))
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (extra `deploy`)')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed (extra `deploy`)')
    unet = write_stage(tmp_path / 'runs/smoke/unet/seed0/joint', 'pixel', 1, backbone=dict(name='unet', width=2), recipe='smoke/unet')
    with pytest.raises(ValueError, match='model.onnx does not run on images of 109 x 168 pixels.*give the height and width'): export_model(load(unet), tmp_path / 'model.onnx')
    assert not (tmp_path / 'model.onnx').exists() and export_model(load(unet), tmp_path / 'model.onnx', (64, 96))['outputs'] == ['logits']
