"""The explorer in JupyterLab, driven by a headless browser: a click changes the evidence, a switch the prediction.

Needs Chromium and chromedriver on PATH and the package selenium (extra `dev`); without them it skips. Screenshots are
kept if the environment variable EXPLORER_SHOTS names a folder, EXPLORER_RUN uses a trained run instead of random weights."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from test_explorer import write_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BROWSER, DRIVER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None), shutil.which('chromedriver')
if not (BROWSER and DRIVER): pytest.skip('needs chromium and chromedriver on PATH', allow_module_level=True)
webdriver = pytest.importorskip('selenium.webdriver', reason='needs the package selenium, extra dev')
pytest.importorskip('jupyterlab', reason='needs JupyterLab, extra repro')
pytest.importorskip('ipyevents', reason='needs ipyevents, extra repro')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-dev-shm-usage', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', '--window-size=1500,1500',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']     # nothing but this computer


def wait_for(what, true, seconds=30):
    "The first true value of a function; a failure says what was awaited."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := true(): return value
        except Exception as e:
            if not type(e).__module__.startswith('selenium'): raise     # a part of the page that is being replaced
        time.sleep(0.1)
    pytest.fail(f'{what}: not within {seconds} s')


def write_notebook(folder):
    "The tutorial, pointed at a run."
    run = os.environ.get('EXPLORER_RUN') or str(write_run(folder / 'runs'))
    if not os.environ.get('EXPLORER_RUN'): write_run(folder / 'runs', 'linear', 'protoseg', 'finetune', 1)
    notebook = nbformat.read(ROOT / 'nbs/tutorials/explore.ipynb', 4)
    cell = next(c for c in notebook.cells if 'parameters' in c.metadata.get('tags', []))
    cell.source += f'\nrun = {run!r}'
    nbformat.write(notebook, folder / 'explore.ipynb')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of the notebook in a JupyterLab with settings of its own."
    folder = tmp_path_factory.mktemp('lab')
    write_notebook(folder)
    quiet = folder / 'settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {f'JUPYTER_{kind}_DIR': str(folder / kind) for kind in ('CONFIG', 'RUNTIME', 'DATA')}
    own |= {f'JUPYTERLAB_{kind.upper()}_DIR': str(folder / kind) for kind in ('settings', 'workspaces')} | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=', '--allow-root', f'--ServerApp.root_dir={folder}', '--LabApp.expose_app_in_browser=True']
    with open(folder / 'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=os.environ | own)
    def answers():
        if server.poll() is not None: pytest.fail('JupyterLab did not start:\n' + (folder / 'lab.log').read_text()[-2000:])
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0
    try:
        wait_for('JupyterLab answers', answers, 60)
        yield f'http://127.0.0.1:{port}/lab/tree/explore.ipynb'
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("browser")}'): options.add_argument(flag)
    try: driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except Exception as e:
        if not type(e).__module__.startswith('selenium'): raise
        pytest.skip(f'{BROWSER} and {DRIVER} do not start together: {str(e).splitlines()[0]}')
    driver.set_script_timeout(120)
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

    def rect(self, element):
        "Left, top, width and height on the screen."
        return self.driver.execute_script('const r = arguments[0].getBoundingClientRect(); return [r.left, r.top, r.width, r.height]', element)

    def click(self, name, x, y):
        "At a share of the width and height of a picture; the size of the picture."
        left, top, w, h = self.rect(self.one(name))
        for kind in 'mousePressed', 'mouseReleased':
            self.driver.execute_cdp_cmd('Input.dispatchMouseEvent', dict(type=kind, x=left + x * w, y=top + y * h, button='left', clickCount=1))
        return w, h

    def point(self): return tuple(map(int, re.findall(r'\d+', self.text('summary'))[:2]))

    def size(self):
        "H, W of the picture."
        return tuple(int(float(self.find(f'.explorer-{name} .noUi-handle')[0].get_attribute('aria-valuemax'))) + 1 for name in ('row', 'column'))

    def boxes(self): return [b for b in self.find('.explorer-switch input') if b.is_displayed()]

    def select(self, name):
        from selenium.webdriver.support.ui import Select
        return Select(self.one(name).find_element('css selector', 'select'))

    def options(self, name): return [o.text for o in self.select(name).options]

    def run_all(self):
        idle = "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        wait_for('the kernel is idle', lambda: self.driver.execute_script(idle), 60)
        self.driver.execute_async_script("const done = arguments[0]; window.jupyterapp.commands.execute('notebook:run-all-cells').then(done, done)")


@pytest.fixture(scope='module')
def page(browser, lab):
    browser.get(lab)
    page = Page(browser)
    page.run_all()
    try:
        wait_for('the panel is shown', lambda: page.find('.explorer-summary') and page.text('summary').startswith('row'), 60)
        wait_for('all cells ran', lambda: len(page.find('.jp-Notebook .jp-RenderedImage img')) >= 2, 60)
    finally: page.shoot('0_first')
    browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", page.find('.jp-OutputArea-output .widget-vbox')[0])
    page.shoot('1_start')
    return page


@pytest.mark.parametrize('css', ['', 'width: 200px', 'height: 300px', 'transform: scale(.6)'])
def test_a_click_moves_the_point_there_however_large_the_picture_is_shown(page, css):
    x, y = {'': (.3, .85), 'width: 200px': (.9, .1), 'height: 300px': (.12, .5)}.get(css, (.7, .7))
    picture, before = page.one('picture'), {name: page.text(name) for name in ('summary', 'scores', 'evidence')}
    style = picture.get_attribute('style')
    page.driver.execute_script("arguments[0].style.cssText += ';' + arguments[1]", picture, css)
    try: w, h = page.click('picture', x, y)
    finally: page.driver.execute_script('arguments[0].style.cssText = arguments[1]', picture, style)
    wait_for('another summary', lambda: page.text('summary') != before['summary'])
    wait_for('other scores', lambda: page.text('scores') != before['scores'] and page.text('evidence') != before['evidence'])
    (row, column), (H, W) = page.point(), page.size()
    assert abs((row + .5) / H - y) < .5 / H + 1 / h and abs((column + .5) / W - x) < .5 / W + 1 / w
    page.shoot('2_clicked')


def test_the_mouse_is_followed(page):
    shown = page.one('classes')
    webdriver.ActionChains(page.driver).move_to_element_with_offset(shown, 20, 10).perform()
    wait_for('the line of the mouse', lambda: page.text('hover').startswith('mouse: row'))
    page.shoot('3_mouse')
    webdriver.ActionChains(page.driver).move_to_element(page.one('status')).perform()
    wait_for('the hint', lambda: page.text('hover').endswith('click to explain'))


def test_switches_change_the_prediction_and_nothing_moves_and_the_button_restores_it(page):
    before, scores, boxes = page.pixels('classes'), page.text('scores'), page.boxes()
    assert boxes and all(b.is_selected() for b in boxes)
    places = [page.rect(b)[:2] for b in boxes]
    for i, box in enumerate(boxes):
        box.click()
        wait_for('the switch is counted', lambda i=i: f' {i + 1} switched off' in page.text('status'))
        if i == 0: page.shoot('4_one_off')
    assert page.boxes() == boxes and [page.rect(b)[:2] for b in boxes] == places
    assert page.text('off').count(',') == len(boxes) - 1 and not any(b.is_selected() for b in boxes) and 'all on' in page.text('scores')
    wait_for('another prediction', lambda: page.pixels('classes') != before)
    page.shoot('5_all_off')
    page.one('reset').click()
    wait_for('everything on', lambda: 'every prototype is on' in page.text('status'))
    wait_for('the old scores', lambda: page.text('scores') == scores)
    assert all(b.is_selected() for b in page.boxes())


def test_the_keyboard_does_it_too(page):
    handle, (row, column) = page.find('.explorer-row .noUi-handle')[0], page.point()
    key, step = (webdriver.Keys.ARROW_UP, 1) if row == 0 else (webdriver.Keys.ARROW_DOWN, -1)
    handle.send_keys(key)
    wait_for('the next row', lambda: page.point() == (row + step, column))
    page.boxes()[0].send_keys(webdriver.Keys.SPACE)
    wait_for('the switch is counted', lambda: '1 switched off' in page.text('status'))
    page.one('reset').send_keys(webdriver.Keys.ENTER)
    wait_for('everything on', lambda: 'every prototype is on' in page.text('status'))


def test_maps_classes_images_and_runs_can_be_chosen(page):
    shown = page.pixels('picture')
    page.select('show').select_by_visible_text('group 1')
    wait_for('the map', lambda: 'group 1' in page.text('title') and page.pixels('picture') != shown)
    page.shoot('6_group')
    name = page.options('cls')[-1]
    page.select('cls').select_by_visible_text(name)
    wait_for('the class', lambda: f'what adds up to {name!r}' in page.text('evidence') and name in page.text('status') and name in page.text('title'))
    page.shoot('7_class')
    page.select('show').select_by_visible_text('picture')
    shown, point = page.pixels('picture'), page.point()
    page.select('choice').select_by_index(1)
    wait_for('the image', lambda: page.pixels('picture') != shown and not page.text('message'))
    page.shoot('8_image')
    if len(page.options('run')) > 1:
        boxes = page.boxes()
        page.select('run').select_by_index(1)
        wait_for('the run', lambda: page.boxes() != boxes and not page.text('message'), 60)
        page.shoot('9_run')
        assert page.point() == point and page.select('choice').first_selected_option.text == page.options('choice')[1]


def test_a_wrong_file_is_a_message_in_the_panel(page):
    place = page.rect(page.one('picture'))
    page.find('.explorer-file input')[0].send_keys('nothing.png', webdriver.Keys.ENTER)
    wait_for('a message', lambda: 'nothing.png does not exist' in page.text('message'))
    page.shoot('10_wrong_file')
    assert page.rect(page.one('picture')) == place


def test_nothing_failed_in_the_notebook(page):
    assert not page.find('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"], .jp-mod-error')
    assert all(img.get_attribute('naturalWidth') != '0' for img in page.find('.jp-Notebook .jp-RenderedImage img'))
