"""The state of the explorer: a switch is a cleared bit, everything on is the model, and the model never changes."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from saved import DATA, write_stage

from scaleprotoseg.explorer import (Explorer, Panel, evidence_table, explorable_runs, marked, pixel_at, plot_switched, score_table,
                                    tile_html, validation_images)
from scaleprotoseg.predict import load

matplotlib.use('Agg')

POINT = (20, 31)


def write_run(runs: Path, head='groups', method='scaleprotoseg', stage='threshold', scales=4) -> Path:
    return write_stage(runs / f'smoke/{method}/seed0/{stage}', head, scales, dict(name='unet', width=4), f'smoke/{method}', pruned=[(0, 0, 1)] * (head != 'pixel'))


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    runs = tmp_path_factory.mktemp('runs')
    return {'groups': write_run(runs), 'linear': write_run(runs, 'linear', 'protoseg', 'finetune', 1),
            'pixel': write_run(runs, 'pixel', 'linear', 'joint', 1)}


@pytest.fixture(scope='module', params=['groups', 'linear'])
def predictor(stages, request): return load(stages[request.param])


@pytest.fixture
def explorer(predictor): return Explorer(predictor, DATA[0].image).move(*POINT)


def test_everything_on_is_the_prediction_of_the_model(explorer, predictor):
    assert (explorer.prediction() == predictor.predict(DATA[0].image)).all() and not explorer.changed.any()
    ours, theirs = explorer.explain(), predictor.explain(DATA[0].image, at=POINT)
    assert ours.to_dict() == theirs.to_dict()


def test_a_switch_is_a_cleared_bit(explorer, predictor, stages):
    off = [(0, 3, 0), (0, 3, 1), (0, 5, 1)]
    for key in off: explorer.switch(*key)
    vetoed = load(predictor.folder)
    for key in off: vetoed.model.prototypes.alive[key] = False
    assert explorer.off == off and explorer.changed.any()
    assert (explorer.prediction() == vetoed.predict(DATA[0].image)).all()
    assert explorer.explain(cls=3).to_dict() == vetoed.explain(DATA[0].image, at=POINT, cls=3).to_dict()


def test_the_loaded_model_never_changes(explorer, predictor):
    before = {k: v.clone() for k, v in predictor.model.state_dict().items()}
    label = predictor.predict(DATA[0].image)
    explorer.switch(0, 3, 0).switch(0, 5, 0, on=False)
    explorer.prediction(), explorer.explain(), explorer.prototypes(3)
    assert all(torch.equal(v, before[k]) for k, v in predictor.model.state_dict().items())
    assert (predictor.predict(DATA[0].image) == label).all() and not Explorer(predictor, DATA[0].image).off


def test_reset_restores_the_exact_prediction(explorer):
    before = explorer.prediction().copy(), explorer.explain().to_dict()
    for c in range(10): explorer.switch(0, c, 0)
    assert explorer.changed.any()
    explorer.reset()
    assert (explorer.prediction() == before[0]).all() and explorer.explain().to_dict() == before[1] and not explorer.off


def test_off_and_on_again_is_as_before(explorer):
    scores = explorer.scores(*POINT)
    assert not torch.equal(explorer.switch(0, 3, 0).scores(*POINT), scores)
    assert torch.equal(explorer.switch(0, 3, 0).scores(*POINT), scores)
    assert torch.equal(explorer.switch(0, 3, 0, on=True).scores(*POINT), scores)


def test_switches_stay_while_the_picture_changes(explorer):
    explorer.switch(0, 3, 0)
    assert explorer.open(DATA[1].image).off == [(0, 3, 0)] and explorer.point == (32, 48)


def test_the_backbone_runs_once_per_picture(predictor, monkeypatch):
    calls, features = [], predictor.model.features
    monkeypatch.setattr(predictor.model, 'features', lambda x: calls.append(1) or features(x))
    explorer = Explorer(predictor, DATA[0].image)
    for c in range(5): explorer.move(c, c).switch(0, c, 0).prediction(), explorer.explain(), explorer.prototypes(c)
    assert len(calls) == 1


def test_effect_is_what_the_switch_does(explorer):
    explorer.switch(0, 4, 0)                                          # from a state that is not the start
    for p in explorer.prototypes(4):
        before = explorer.explain(4).logit
        after = explorer.switch(*p.key).explain(4).logit
        explorer.switch(*p.key)
        assert after - before == pytest.approx(p.effect, abs=1e-4) and p.on == (p.key != (0, 4, 0))


def test_effect_of_a_class_s_last_prototype(explorer):
    keys = [p.key for p in explorer.prototypes(6)]
    for key in keys[1:]: explorer.switch(*key)
    last = explorer.prototypes(6)[0]
    before = explorer.explain(6).logit
    assert explorer.switch(*last.key).explain(6).logit - before == pytest.approx(last.effect, abs=1e-4)
    assert not explorer.explain(6).own                                # no prototype, no evidence
    evidence_table(explorer, 6)


def test_prototypes_of_a_class_agree_with_the_explanation(explorer):
    parts = {(p.scale, p.k): p for e in explorer.explain(cls=2).own for p in e.parts}
    for p in explorer.prototypes(2):
        assert (p.scale, p.k) not in parts or parts[p.scale, p.k].similarity == pytest.approx(p.similarity, abs=1e-5)
        assert bool(p.weights) == ((p.scale, p.k) in parts)
    assert (0, 0, 1) not in [p.key for p in explorer.prototypes(0)]   # pruned in the loaded model


def test_quick_scores_are_the_scores_of_the_explanation(explorer):
    for point in POINT, (0, 0), (63, 95), (0, 95):
        scores = explorer.move(*point).explain().scores
        quick = dict(zip(explorer.labels.names, explorer.scores(*point).tolist()))
        assert quick == pytest.approx(scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize('point', [(64, 0), (0, 96), (-1, 3), (0.5, 2)])
def test_a_point_outside_is_refused(explorer, point):
    with pytest.raises(ValueError, match='64 rows and 96 columns'): explorer.move(*point)
    assert explorer.point == POINT


@pytest.mark.parametrize('key', [(0, 0, 1), (0, 0, 2), (9, 0, 0), (0, -1, 0)])
def test_a_prototype_that_is_not_there_is_refused(explorer, key):
    with pytest.raises(ValueError, match='no living prototype'): explorer.switch(*key)
    assert not explorer.off


def test_a_black_box_is_refused(stages):
    with pytest.raises(ValueError, match='black box'): Explorer(load(stages['pixel']), DATA[0].image)


def test_a_model_without_patches_is_refused(stages, tmp_path):
    folder = write_run(tmp_path, stage='joint')
    (folder / 'prototypes.json').unlink()
    with pytest.raises(FileNotFoundError, match='project'): Explorer(load(folder), DATA[0].image)


def test_tables_and_tiles_show_what_is_off_and_escape_names(explorer):
    assert 'all on' not in score_table(explorer, 3) + evidence_table(explorer, 3)
    explorer.switch(0, 3, 0)
    assert 'all on' in score_table(explorer, 3) and 'all on' in evidence_table(explorer, 3)
    p = explorer.prototypes(3)[0]
    p.name = '<b>'
    assert '&lt;b&gt;' in tile_html(p) and 'opacity:0.3' in tile_html(p)


def test_the_contributions_in_the_table_sum_to_the_score(explorer):
    import re
    cells = re.findall(r'>([+−][\d.e+−]+)</td></tr>', evidence_table(explorer, 3))
    *parts, total = [float(x.replace('−', '-')) for x in cells]
    assert sum(parts) == pytest.approx(total, rel=0.02, abs=0.02 * max(map(abs, parts)))


def test_the_table_of_a_class_that_is_switched_off_sums_to_its_constant_score(tmp_path):
    """The nearest prototype decides; of a class without any the score is constant, also if one of its prototypes was dead from the start."""
    import re
    folder = write_stage(tmp_path / 'smoke/prototype_view/seed0/snap', 'nearest', 4, dict(name='unet', width=4), 'smoke/prototype_view', pruned=[(0, 3, 0)])
    seen = Explorer(load(folder), DATA[0].image).move(*POINT)
    for s, c, k in np.argwhere(seen.predictor.model.prototypes.alive.numpy()).tolist():
        if c == 3: seen.switch(s, c, k)
    adds = [row[1] for row in re.findall(r'>([^<]*)</td><td[^>]*>([+−][\d.e+−]+)</td>', evidence_table(seen, 3))]
    *parts, total = [float(x.replace('−', '-')) for x in adds]
    assert total == -10 == pytest.approx(sum(parts)), evidence_table(seen, 3)


def test_a_group_that_is_switched_off_keeps_its_name(stages):
    seen = Explorer(load(stages['groups']), DATA[0].image).move(*POINT)
    before = {e.name for e in seen.explain(3).own}
    for part in next(e for e in seen.explain(3).own if e.name.endswith('group 1')).parts: seen.switch(part.scale, 3, part.k, False)
    assert seen.predictor.model.prototypes.alive[:, 3].sum() > len(seen.off) and {e.name for e in seen.explain(3).own} == before


def test_figure_of_the_switches(explorer):
    fig = plot_switched(explorer.switch(0, 3, 0))
    assert [ax.get_title() for ax in fig.axes][1:] == ['with all prototypes', f'1 switched off, {explorer.changed.mean():.1%} changed']


@pytest.mark.parametrize('shown', [(340, 227), (97, 64), (1000, 667)])
def test_the_pixel_under_the_mouse_is_the_pixel_under_the_ring(shown):
    for point in (0, 0), (20, 31), (63, 95):
        x, y = ((i + 0.5) / n * m - 0.5 for i, n, m in zip(point[::-1], (96, 64), shown))
        event = dict(relativeX=round(x), relativeY=round(y), boundingRectWidth=shown[0], boundingRectHeight=shown[1])
        assert np.abs(np.subtract(pixel_at(event, (64, 96)), point)).max() <= (1 if shown[0] < 100 else 0)
    picture = marked(np.full((64, 96, 3), 128, np.uint8), (20, 31), 960)
    y, x = np.nonzero((picture == 0).all(-1))
    assert abs(y.mean() / 10 - 20.5) < 0.2 and abs(x.mean() / 10 - 31.5) < 0.2


# -- runs, pictures and the panel -------------------------------------------------------------------------------------

def test_runs_with_prototypes_are_offered_the_given_one_first(stages):
    assert list(explorable_runs(stages['linear'])) == ['smoke/protoseg/seed0', 'smoke/scaleprotoseg/seed0']
    assert explorable_runs(stages['groups'].parent)['smoke/scaleprotoseg/seed0'] == stages['groups']


def test_a_damaged_run_does_not_hide_the_others(stages, tmp_path):
    shutil.copytree(stages['groups'].parents[2], tmp_path / 'smoke')
    (tmp_path / 'smoke/protoseg' / '/'.join(stages['linear'].parts[-2:]) / 'config.json').write_text('{broken')
    assert list(explorable_runs(tmp_path / 'smoke/scaleprotoseg' / stages['groups'].parent.name)) == ['smoke/scaleprotoseg/seed0']


def test_datasets_are_known_without_further_imports(stages):
    code = f"from scaleprotoseg.explorer import validation_images; print(len(validation_images({str(stages['groups'])!r})))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '4'


def test_validation_images_are_those_of_the_recipe(stages, tmp_path):
    assert validation_images(stages['groups']).ids == validation_images(stages['linear']).ids
    (tmp_path / 'config.json').write_text(json.dumps(json.loads((stages['groups'] / 'config.json').read_text()) | {'recipe': 'mine/x'}))
    with pytest.raises(KeyError, match='unknown recipe'): validation_images(tmp_path)


@pytest.fixture
def panel(stages):
    pytest.importorskip('ipyevents')
    return Panel(stages['groups'])


def event(panel, row, column):
    H, W = panel.explorer.image.shape[:2]
    return dict(type='click', relativeX=column, relativeY=row, boundingRectWidth=W, boundingRectHeight=H)


def test_panel_click_switch_and_reset(panel):
    panel._click(event(panel, 5, 7))
    assert panel.explorer.point == (5, 7) == (panel.row.value, panel.column.value) and 'row 5, column 7' in panel.summary.value
    before = panel.classes.value, panel.scores.value
    tick, cls = panel._tiles[1][0][1], panel.shown_class
    tick.value = False
    assert panel.explorer.off == [(1, cls, 0)] and panel.scores.value != before[1]
    assert '1 switched off' in panel.status.value and f'{panel.explorer.labels.names[cls]} s2 r12 p1' in panel.off.value
    panel.reset.click()
    assert not panel.explorer.off and (panel.classes.value, panel.scores.value) == before and tick.value


def test_panel_keeps_the_explained_class_whatever_is_switched_off(panel):
    panel._click(event(panel, *POINT))
    cls, shown = panel.shown_class, [tick for tiles in panel._tiles for box, tick, _ in tiles if box.layout.display != 'none']
    for tick in shown: tick.value = False
    for key in torch.nonzero(panel.explorer.predictor.model.prototypes.alive).tolist(): panel.explorer.switch(*key, on=False)
    panel.render()
    assert int(panel.explorer.scores(*POINT).argmax()) != cls == panel.shown_class
    assert not any(tick.value for tick in shown) and f'(all on: {panel.explorer.labels.names[cls]})' in panel.summary.value
    assert 'outlined' in panel.heading.value


def test_panel_says_what_is_under_the_mouse(panel):
    hint = panel.hover.value
    panel._move(event(panel, 5, 7) | dict(type='mousemove'))
    assert 'mouse: row 5, column 7, label: ' in panel.hover.value and panel.explorer.point != (5, 7)
    panel._move(dict(type='mouseleave'))
    assert panel.hover.value == hint


def test_panel_sliders_move_the_point(panel):
    panel.row.value, panel.column.value = 3, 4
    assert panel.explorer.point == (3, 4) and 'row 3, column 4' in panel.summary.value


def test_panel_shows_every_picture_there_is(panel):
    seen = set()
    for name in panel.show.options:
        panel.show.value = name
        seen.add(panel.picture.value)
    assert {'picture', 'label', 'group 1'} <= set(panel.show.options) and len(seen) >= 5


def test_panel_compares_a_map_before_and_after_a_switch_on_one_scale(panel):
    panel.show.value = 'group 1'
    title = panel.title.value
    assert f'{panel.explorer.labels.names[panel.shown_class]} group 1: ' in title and 'yellow' in title
    group = next(e for e in panel.explorer.explain(panel.shown_class).own if e.name.endswith('group 1'))
    part = group.parts[0]
    panel._tiles[part.scale][part.k][1].value = False
    high = lambda text: float(text.split('dark, ')[1].split()[0])
    assert panel.show.value == 'group 1' and high(panel.title.value) >= high(title)


def test_panel_explains_a_chosen_class(panel):
    panel.cls.value = 8
    assert "'pony'" in panel.evidence.value.replace('&#x27;', "'") and panel.shown_class == 8


def test_panel_goes_through_images_runs_and_files(panel, tmp_path):
    panel.choice.value = 1
    panel._click(event(panel, 5, 7))
    first = panel.picture.value
    panel.run.value = 'smoke/protoseg/seed0'
    assert panel.explorer.kind == 'similarities' and not panel.message.value
    assert panel.choice.value == 1 and panel.explorer.point == (5, 7) and panel.picture.value == first       # to compare the runs
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(tmp_path / 'mine.png')
    panel.file.value = str(tmp_path / 'mine.png')
    assert panel.explorer.image.shape == (40, 50, 3) and panel.row.max == 39 and 'label' not in panel.show.options
    panel.file.value = str(tmp_path / 'missing.png')
    assert 'missing.png' in panel.message.value and panel.explorer.image.shape == (40, 50, 3)
    mine = panel.picture.value
    panel.run.value = 'smoke/scaleprotoseg/seed0'
    assert panel.picture.value == mine and panel.choice.value is None
    panel.choice.value = 1                                            # the same as before the file
    assert panel.picture.value == first and not panel.file.value and 'label' in panel.show.options


def test_panel_shows_errors_that_nobody_expected(panel, monkeypatch):
    def fail(*args): raise RuntimeError('out of <memory>')
    monkeypatch.setattr(panel.explorer, 'move', fail)
    with pytest.raises(RuntimeError): panel._click(event(panel, 5, 7))
    assert 'RuntimeError: out of &lt;memory&gt;' in panel.message.value and 'alert' in panel.message.value
    monkeypatch.undo()
    panel._click(event(panel, 5, 7))
    assert not panel.message.value and panel.explorer.point == (5, 7)


def test_panel_survives_a_broken_run(panel, stages, monkeypatch):
    panel.runs['smoke/protoseg/seed0'] = stages['groups'].parent / 'nowhere'
    panel.run.value = 'smoke/protoseg/seed0'
    assert 'nowhere' in panel.message.value and panel.explorer.kind == 'groups' and panel.run.value == 'smoke/scaleprotoseg/seed0'


def test_panel_without_the_dataset_asks_for_a_file(stages, monkeypatch):
    pytest.importorskip('ipyevents')
    from scaleprotoseg import explorer
    def missing(*args): raise FileNotFoundError('no folder data')
    monkeypatch.setattr(explorer, 'validation_images', missing)
    panel = Panel(stages['groups'])
    assert 'path of a picture' in panel.message.value and 'label' not in panel.show.options
    panel._click(event(panel, 5, 7))
    assert 'path of a picture' in panel.message.value                 # still true
    panel = Panel(stages['groups'], image=DATA[0].image.mul(255).byte().permute(1, 2, 0).numpy())
    assert panel.explorer.image.shape == (64, 96, 3) and not panel.message.value


def test_import_needs_no_widgets():
    code = "import sys, scaleprotoseg.explorer; assert not {'ipywidgets', 'ipyevents', 'IPython', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_panel_says_what_to_install(stages, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipyevents', None)
    with pytest.raises(ImportError, match='scaleprotoseg\\[repro\\]'): Panel(stages['groups'])
