"Every table and figure of the papers has a notebook, every notebook its place, and the committed table says so."
from collections import Counter
from pathlib import Path

import pytest

from scaleprotoseg.contents import (
    PAPER_NOTEBOOKS,
    PaperNotebook,
    contents_markdown,
    contents_table,
    joined,
    paper_notebooks,
    published_contents,
    status,
)
from scaleprotoseg.recipes import experiments
from scaleprotoseg.report import write_contents

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / 'data/published'


def test_the_list_is_that_of_the_papers():
    items = published_contents(PUBLISHED)
    numbers = {p: Counter(i.split()[0] for i in rows.item) for p, rows in items.groupby('paper')}
    assert numbers == {'scaleprotoseg': {'Table': 10, 'Figure': 35}, 'protoseg': {'Table': 1, 'Figure': 7},
                       'prototype_view': {'Table': 3, 'Figure': 4}}
    for (_, kind), rows in items.assign(kind=items.item.str.split().str[0]).groupby(['paper', 'kind']):
        assert sorted(int(i.split()[1]) for i in rows.item) == list(range(1, len(rows) + 1)), kind


def test_every_item_has_exactly_one_notebook_and_every_notebook_is_there():
    items = published_contents(PUBLISHED)
    shown = Counter((n.paper, item) for n in PAPER_NOTEBOOKS for item in n.items)
    assert shown == Counter(zip(items.paper, items.item))
    there = {(p.parent.name, p.stem) for p in (ROOT / 'nbs/paper').glob('*/*.ipynb')}
    assert there == {(n.paper, n.name) for n in PAPER_NOTEBOOKS}


@pytest.mark.parametrize('notebook', [n for n in PAPER_NOTEBOOKS if n.shows], ids=lambda n: f'{n.paper}-{n.name}')
def test_every_notebook_is_for_some_experiment_on_the_papers_data(notebook):
    assert any(notebook.suits(e) for e in experiments() if e.split('-')[0] in ('pascal', 'cityscapes', 'ade20k', 'cocostuff', 'em'))


def test_the_committed_table_is_current(tmp_path):
    "Of what is in git: `scaleprotoseg report` writes it anew whenever results change."
    committed = ROOT / 'figures/contents.md'
    again = contents_markdown(contents_table(ROOT / 'figures', PUBLISHED))
    assert committed.read_text(encoding='utf-8').endswith(again), 'run `scaleprotoseg report EXPERIMENT` and commit figures/contents.md'


def test_contents_are_written_for_any_folder(tmp_path):
    text = write_contents(tmp_path, PUBLISHED).read_text(encoding='utf-8')
    assert '| Figures 14–19 |' in text and 'done' not in text.split('\n## ', 1)[1]
    assert [p.name for p in tmp_path.iterdir()] == ['contents.md']


def test_status_of_a_notebook(tmp_path):
    table_05 = next(n for n in PAPER_NOTEBOOKS if n.name == 'table_05')
    table_07 = next(n for n in PAPER_NOTEBOOKS if n.name == 'table_07')
    table_03 = next(n for n in PAPER_NOTEBOOKS if n.name == 'table_03')
    assert status(table_05, 'demo', tmp_path) == 'needs EM' and status(table_05, 'em', tmp_path) == 'ready'
    (tmp_path / 'em/scaleprotoseg').mkdir(parents=True)
    (tmp_path / 'em/scaleprotoseg/table_051.csv').touch()
    assert status(table_05, 'em', tmp_path) == 'ready'
    (tmp_path / 'em/scaleprotoseg/table_05.csv').touch()
    assert status(table_05, 'em', tmp_path) == 'done'
    (tmp_path / 'pascal-ablations/scaleprotoseg').mkdir(parents=True)
    (tmp_path / 'pascal-ablations/scaleprotoseg/table_07_curve.png').touch()
    assert status(table_07, 'pascal', tmp_path) == 'done'           # its ablations are an experiment of their own
    assert status(table_07, 'demo', tmp_path) == 'ready'
    assert status(table_03, 'em', tmp_path) == 'ready, without parts' and status(table_03, 'demo', tmp_path) == 'ready'


def test_ranges_of_items():
    assert PaperNotebook('p', 'n', 'Figure 5, 12-13').items == ['Figure 5', 'Figure 12', 'Figure 13']
    assert joined(['Figure 5', 'Figure 12', 'Figure 13']) == 'Figures 5, 12–13'


def test_smoke_has_all_but_what_needs_other_data_or_more_variants():
    left = {(n.paper, n.name) for n in PAPER_NOTEBOOKS} - set(paper_notebooks('smoke'))
    assert left == {('scaleprotoseg', 'table_05'), ('scaleprotoseg', 'table_06'), ('protoseg', 'table_01'), ('protoseg', 'figure_06'), ('families', 'length'),
                    *(('prototype_view', f'table_0{n}') for n in (1, 2, 3))}
