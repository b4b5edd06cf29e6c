"""The explorer in JupyterLab, driven by a headless browser: a click changes the evidence, a switch the prediction.

Needs Chromium, its driver and the package selenium (extra `dev`); without them it skips. Screenshots are kept if the
environment variable EXPLORER_SHOTS names a folder, EXPLORER_RUN uses a trained run instead of random weights."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from test_explorer import write_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BROWSER, DRIVER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None), shutil.which('chromedriver')
if not (BROWSER and DRIVER): pytest.skip('needs chromium and chromedriver on PATH', allow_module_level=True)
webdriver = pytest.importorskip('selenium.webdriver', reason='needs the package selenium')
pytest.importorskip('jupyterlab')
pytest.importorskip('ipyevents')


def wait_for(what, true, seconds=60):
    "The first true value of a function; a failure says what was awaited."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := true(): return value
        except Exception as e:
            if not type(e).__module__.startswith('selenium'): raise     # a part of the page that is being replaced
        time.sleep(0.2)
    pytest.fail(f'{what}: not within {seconds} s')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab whose folder holds the notebook, pointed at a run."
    folder = tmp_path_factory.mktemp('lab')
    quiet = folder / 'settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    run = os.environ.get('EXPLORER_RUN') or str(write_run(folder / 'runs'))
    notebook = nbformat.read(ROOT / 'nbs/tutorials/explore.ipynb', 4)
    cell = next(c for c in notebook.cells if 'parameters' in c.metadata.get('tags', []))
    cell.source += f'\nrun = {run!r}'
    nbformat.write(notebook, folder / 'explore.ipynb')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {f'JUPYTER_{kind}_DIR': str(folder / kind) for kind in ('CONFIG', 'RUNTIME', 'DATA')}     # no settings of the user
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=', '--allow-root', f'--ServerApp.root_dir={folder}']
    with open(folder / 'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder,
                                  env=os.environ | own | {'OMP_NUM_THREADS': '1', 'JUPYTERLAB_SETTINGS_DIR': str(folder / 'settings'),
                                                          'JUPYTERLAB_WORKSPACES_DIR': str(folder / 'workspaces')})
    def answers():
        if server.poll() is not None: pytest.fail('JupyterLab did not start:\n' + (folder / 'lab.log').read_text()[-2000:])
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0
    try:
        wait_for('JupyterLab answers', answers)
        yield f'http://127.0.0.1:{port}/lab/tree/explore.ipynb'
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=1500,1500',
                 f'--user-data-dir={tmp_path_factory.mktemp("browser")}'): options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    "The panel as a person sees it."
    def __init__(self, driver): self.driver = driver

    def find(self, css): return self.driver.find_elements('css selector', css)

    def one(self, name): return self.find(f'.explorer-{name}')[0]

    def text(self, name): return self.one(name).text

    def pixels(self, name): return self.one(name).get_attribute('src')

    def shoot(self, name):
        if folder := os.environ.get('EXPLORER_SHOTS'): self.driver.save_screenshot(str(Path(folder) / f'{name}.png'))

    def scroll(self): self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", self.find('.jp-OutputArea-output .widget-vbox')[0])

    def click(self, name, x, y):
        "At a share of the width and height of a picture."
        shown, actions = self.one(name), webdriver.ActionChains(self.driver)
        w, h = shown.size['width'], shown.size['height']
        actions.move_to_element_with_offset(shown, round((x - .5) * w), round((y - .5) * h)).click().perform()
        return w, h

    def run_all(self):
        wait_for('the kernel is idle', lambda: 'Idle' in self.find('.jp-StatusBar-Widget, #jp-main-statusbar')[0].text)
        next(m for m in self.find('.lm-MenuBar-item') if m.text == 'Run').click()
        wait_for('the menu', lambda: [m for m in self.find('.lm-Menu-item') if m.text.startswith('Run All Cells')])[0].click()

    def shows_panel(self):
        for button in self.find('.jp-Dialog .jp-mod-accept'): button.click()     # JupyterLab may ask for the kernel
        return self.find('.explorer-summary') and self.text('summary').startswith('row')


@pytest.fixture(scope='module')
def page(lab, browser):
    browser.get(lab)
    page = Page(browser)
    page.run_all()
    try: wait_for('the panel is shown', page.shows_panel, 120)
    finally: page.shoot('0_first')
    wait_for('all cells ran', lambda: len(page.find('.jp-Notebook .jp-RenderedImage img')) >= 2, 180)
    page.scroll()
    page.shoot('1_start')
    return page


def test_a_click_moves_the_point_and_changes_the_evidence(page):
    before = {name: page.text(name) for name in ('summary', 'scores', 'evidence')}
    w, h = page.click('picture', .3, .85)
    wait_for('another summary', lambda: page.text('summary') != before['summary'])
    wait_for('other scores', lambda: page.text('scores') != before['scores'] and page.text('evidence') != before['evidence'])
    row, column = (int(word.strip(',:')) for word in page.text('summary').split() if word.strip(',:').isdigit())
    H, W = (int(page.find(f'.explorer-{name} .noUi-handle')[0].get_attribute('aria-valuemax').split('.')[0]) + 1 for name in ('row', 'column'))
    assert abs(row / H - .85) < 2 / H + 1 / h and abs(column / W - .3) < 2 / W + 1 / w     # where we clicked
    page.shoot('2_clicked')


def test_the_mouse_is_followed(page):
    shown = page.one('classes')
    webdriver.ActionChains(page.driver).move_to_element_with_offset(shown, 20, 10).perform()
    wait_for('the line of the mouse', lambda: page.text('hover').startswith('mouse: row'))
    page.shoot('3_mouse')


def test_switches_change_the_prediction_and_the_button_restores_it(page):
    before, scores = page.pixels('classes'), page.text('scores')
    boxes = [b for b in page.find('.explorer-switch input') if b.is_displayed()]
    assert boxes and all(b.is_selected() for b in boxes)
    for i in range(len(boxes)):
        [b for b in page.find('.explorer-switch input') if b.is_displayed()][i].click()
        wait_for('the switch is listed', lambda i=i: page.text('status').count(' p') >= i + 1 and 'switched off' in page.text('status'))
        if i == 0: page.shoot('4_one_off')
        if page.text('summary').endswith(')') or i == 3: break
    page.shoot('5_some_off')
    assert 'all on' in page.text('scores')
    wait_for('another prediction', lambda: page.pixels('classes') != before)
    page.one('reset').click()
    wait_for('everything on', lambda: 'every prototype is on' in page.text('status'))
    wait_for('the old scores', lambda: page.text('scores') == scores)
    assert all(b.is_selected() for b in page.find('.explorer-switch input') if b.is_displayed())


def test_the_keyboard_does_it_too(page):
    def value(): return int(page.text('summary').split()[1].strip(','))
    handle, before = page.find('.explorer-row .noUi-handle')[0], value()
    handle.send_keys(webdriver.Keys.ARROW_UP)
    wait_for('one row on', lambda: value() == before + 1)
    box = next(b for b in page.find('.explorer-switch input') if b.is_displayed())
    box.send_keys(webdriver.Keys.SPACE)
    wait_for('the switch is listed', lambda: 'switched off' in page.text('status'))
    page.one('reset').send_keys(webdriver.Keys.ENTER)
    wait_for('everything on', lambda: 'every prototype is on' in page.text('status'))


def test_a_wrong_file_is_a_message_in_the_panel(page):
    field = next(f for f in page.find('.widget-text input') if f.get_attribute('placeholder').startswith('path'))
    field.send_keys('nothing.png', webdriver.Keys.ENTER)
    wait_for('a message', lambda: 'nothing.png' in page.text('message'))
    page.shoot('6_wrong_file')


def test_nothing_failed_in_the_notebook(page):
    assert not page.find('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"], .jp-mod-error')
    assert np.all([img.get_attribute('naturalWidth') != '0' for img in page.find('.jp-Notebook .jp-RenderedImage img')])
