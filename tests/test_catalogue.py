"The catalogue of datasets and its downloader, tried on servers of this test."
import hashlib
import http.server
import io
import re
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import pytest

import scaleprotoseg.catalogue as C
from scaleprotoseg.basics import UnknownName
from scaleprotoseg.data import DATASETS, rng

BYTES = rng('archive').integers(0, 256, 3_000_000, 'uint8').tobytes()


class Site:
    "A small web site: `files` by path; counts what it was asked."
    def __init__(self):
        self.files, self.asked = {'/a.bin': BYTES}, []
        self.ranges, self.breaks_at, self.etag, self.date, self.total = True, None, '"1"', None, True


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'   # the line is closed after each answer

    def log_message(self, *args): pass

    def do_GET(self):
        site, content = self.server.site, self.server.site.files.get(self.path)
        site.asked.append(self.headers.get('Range'))
        if content is None: return self.send_error(404)
        start, asked = 0, re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked and site.ranges and self.headers.get('If-Range') in (None, site.date, site.etag): start = int(asked[1])
        if start >= len(content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        if site.total: self.send_header('Content-Length', str(len(content) - start))
        if site.etag: self.send_header('ETag', site.etag)
        if site.date: self.send_header('Last-Modified', site.date)
        self.end_headers()
        self.wfile.write(content[start:][:site.breaks_at])


@pytest.fixture
def site():
    with serving() as s: yield s


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args): pass   # the client may close first


@contextmanager
def serving():
    site = Site()
    with Server(('127.0.0.1', 0), Handler) as server:
        server.site, site.url = site, f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(.01,), daemon=True)
        thread.start()
        yield site
        server.shutdown()


def fetch(site, path, checksum=None, name='a.bin'):
    return C.fetch(f'{site.url}/{name}', path, checksum, progress=False, timeout=5)


def md5(content): return 'md5:' + hashlib.md5(content).hexdigest()


# ---- fetch

def test_complete_download_with_each_kind_of_checksum(site, tmp_path):
    for method in ('md5', 'sha1', 'sha256'):
        path = fetch(site, tmp_path/method/'a.bin', f'{method}:{hashlib.new(method, BYTES).hexdigest()}')
        assert path.read_bytes() == BYTES and [p.name for p in path.parent.iterdir()] == ['a.bin']
    assert fetch(site, path).read_bytes() == BYTES and len(site.asked) == 3       # a finished file is not asked for again


def test_interrupted_download_continues_where_it_broke(site, tmp_path):
    site.breaks_at = 1_200_000
    path = tmp_path/'a.bin'
    with pytest.raises(ConnectionError, match='broke off after 1,200,000 of 3,000,000 bytes. The same call continues'): fetch(site, path)
    assert not path.exists() and (tmp_path/'a.bin.part').stat().st_size == 1_200_000
    with pytest.raises(ConnectionError, match='2,400,000 of 3,000,000'): fetch(site, path)
    assert fetch(site, path, md5(BYTES)).read_bytes() == BYTES
    assert site.asked == [None, 'bytes=1200000-', 'bytes=2400000-'] and [p.name for p in tmp_path.iterdir()] == ['a.bin']


def test_server_without_ranges_starts_again(site, tmp_path):
    site.ranges, site.breaks_at = False, 1_200_000
    with pytest.raises(ConnectionError): fetch(site, tmp_path/'a.bin')
    site.breaks_at = None
    assert fetch(site, tmp_path/'a.bin', md5(BYTES)).read_bytes() == BYTES
    assert site.asked == [None, 'bytes=1200000-']


@pytest.mark.parametrize('first, second', [(('"1"', None), ('"2"', None)), ((None, 'Mon, 01 Jan 2024 00:00:00 GMT'), (None, 'Tue')),
                                           (('W/"1"', 'Mon'), ('W/"1"', 'Tue'))])
def test_file_that_changed_meanwhile_is_fetched_anew(site, tmp_path, first, second):
    site.breaks_at, (site.etag, site.date) = 1_200_000, first
    with pytest.raises(ConnectionError): fetch(site, tmp_path/'a.bin')
    site.breaks_at, (site.etag, site.date), site.files['/a.bin'] = None, second, BYTES[::-1]
    assert fetch(site, tmp_path/'a.bin').read_bytes() == BYTES[::-1]


def test_shorter_file_that_replaced_a_longer_one(site, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(BYTES[::-1] + b'more')    # no version known, no byte left to send
    assert fetch(site, tmp_path/'a.bin', md5(BYTES)).read_bytes() == BYTES


def test_part_that_is_whole_already_is_taken(site, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(BYTES)
    assert fetch(site, tmp_path/'a.bin', md5(BYTES)).read_bytes() == BYTES and len(site.asked) == 1


def test_wrong_checksum_removes_the_file(site, tmp_path):
    with pytest.raises(ValueError, match=f'a.bin has {md5(BYTES).replace(":", " ")}, expected md5:0000; removed'):
        fetch(site, tmp_path/'a.bin', 'md5:0000')
    assert not list(tmp_path.iterdir())


def test_server_that_does_not_say_the_size(site, tmp_path):
    site.total = False
    assert fetch(site, tmp_path/'a.bin', md5(BYTES)).read_bytes() == BYTES


def test_404_and_dead_servers_are_named(site, tmp_path):
    with pytest.raises(OSError, match='/gone.bin answers 404 Not Found. The file may have moved'): fetch(site, tmp_path/'x', name='gone.bin')
    with pytest.raises(ConnectionError, match='cannot reach http://127.0.0.1:1/'): C.fetch('http://127.0.0.1:1/a', tmp_path/'x', progress=False)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_noticed_before_the_download(site, tmp_path, monkeypatch):
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda _: type('', (), {'free': 1000}))
    with pytest.raises(OSError, match='room for 1,000 bytes, 3,000,000 are needed'): fetch(site, tmp_path/'a.bin')


def test_progress_bar_shows_the_name(site, tmp_path, capsys):
    C.fetch(f'{site.url}/a.bin', tmp_path/'a.bin')
    assert 'a.bin' in (err := capsys.readouterr().err) and '3.00M' in err


# ---- unpack

def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, content in files.items(): z.writestr(name, content)
    return out.getvalue()


def tarred(mode='w', **files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, content in files.items():
            m = tarfile.TarInfo(name)
            if isinstance(content, str): m.type, m.linkname = tarfile.SYMTYPE, content
            else: m.size = len(content)
            t.addfile(m, io.BytesIO(content if isinstance(content, bytes) else b''))
    return out.getvalue()


@pytest.mark.parametrize('content', [zipped(**{'d/x': b'1'}), tarred(**{'d/x': b'1'}), tarred('w:gz', **{'d/x': b'1'})], ids=['zip', 'tar', 'tgz'])
def test_zip_and_tar_are_unpacked_and_damage_is_named(tmp_path, content):
    (tmp_path/'a').write_bytes(content)
    for _ in range(2): C.unpack(tmp_path/'a', tmp_path/'out', progress=False)      # over what is there
    assert (tmp_path/'out/d/x').read_bytes() == b'1'
    (tmp_path/'a').write_bytes(content[:len(content) // 2] if content[:2] != b'd/' else content[:600])
    with pytest.raises(ValueError, match='a is damaged'): C.unpack(tmp_path/'a', tmp_path/'out', progress=False)


@pytest.mark.parametrize('content', [zipped(**{'../x': b'1'}), zipped(**{'/tmp/x': b'1'}), zipped(**{'d/../../x': b'1'}),
                                     tarred(**{'../x': b'1'}), tarred(**{'d/../../x': b'1'}),
                                     tarred(**{'link': '../..', 'link/x': b'1'}), tarred(**{'link': '/etc'})])
def test_nothing_is_written_outside_the_folder(tmp_path, content):
    (tmp_path/'a').write_bytes(content)
    with pytest.raises(ValueError, match='outside the folder'): C.unpack(tmp_path/'a', tmp_path/'deep/out', progress=False)
    assert {p.name for p in tmp_path.rglob('*')} == {'a', 'deep', 'out'}


# ---- download

@pytest.fixture
def camvid_site(site, monkeypatch):
    "A card whose two archives are on the site of this test."
    site.files |= {'/one.zip': zipped(**{'train/f.png': b'', 'trainannot/f.png': b''}), '/two.tar': tarred(**{'val/f.png': b'', 'valannot/f.png': b''})}
    card = replace(C.CATALOGUE['camvid'], archives=(
        C.Archive(f'{site.url}/one.zip', 'camvid/trainannot', 'camvid', md5(site.files['/one.zip'])),
        C.Archive(f'{site.url}/two.tar', 'camvid/valannot', 'camvid')))
    monkeypatch.setitem(C.CATALOGUE, 'camvid', card)
    return site


def test_download_makes_a_dataset_and_does_nothing_twice(camvid_site, tmp_path):
    for _ in range(2): assert C.download('camvid', tmp_path, progress=False) == tmp_path
    assert C.found(C.CATALOGUE['camvid'], tmp_path)['val'] == C.Found(1, 101, '100 of 101 images')
    assert len(camvid_site.asked) == 2
    assert sorted(p.name for p in (tmp_path/'downloads').iterdir()) == ['one.zip.json', 'two.tar.json']


def test_download_leaves_alone_what_the_user_has(camvid_site, tmp_path):
    (tmp_path/'camvid/trainannot').mkdir(parents=True)
    C.download('camvid', tmp_path, progress=False)
    assert len(camvid_site.asked) == 1 and not (tmp_path/'camvid/train').exists()


def test_interrupted_unpacking_is_done_again(camvid_site, tmp_path, monkeypatch):
    def half(archive, folder, progress):
        (folder/'trainannot').mkdir(parents=True)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(C, 'unpack', half)
        with pytest.raises(KeyboardInterrupt): C.download('camvid', tmp_path, progress=False)
    C.download('camvid', tmp_path, progress=False)
    assert (tmp_path/'camvid/trainannot/f.png').exists() and len(camvid_site.asked) == 2     # the archive was still there


def test_archive_of_something_else_is_noticed(camvid_site, tmp_path):
    camvid_site.files['/two.tar'] = tarred(other=b'1')
    with pytest.raises(ValueError, match='two.tar does not contain camvid/valannot'): C.download('camvid', tmp_path, progress=False)
    camvid_site.files['/two.tar'] = b'<html>This page has moved'
    (tmp_path/'downloads/two.tar').unlink()
    with pytest.raises(ValueError, match='two.tar is damaged'): C.download('camvid', tmp_path, progress=False)


@pytest.mark.parametrize('name', ['cityscapes', 'cityscapes-parts', 'pascal-parts', 'ade20k-full', 'em', 'camvid', 'partscapes', 'folder'])
def test_what_must_not_or_cannot_be_fetched_says_how_to_get_it(name, tmp_path):
    with pytest.raises(ValueError, match=f'{name} cannot be downloaded by a program'): C.download(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'cityscapes'"): C.download('citiscapes', tmp_path)
    with pytest.raises(UnknownName, match="did you mean 'ade20k'"): C.table(tmp_path, ['ade20'])


# ---- the cards

def test_every_dataset_has_a_card_and_every_card_a_dataset():
    assert {c.dataset or c.name for c in C.CATALOGUE.values()} <= set(DATASETS)
    assert {'partscapes', 'pascal', 'cityscapes', 'ade20k', 'cocostuff', 'em', 'camvid', 'folder', 'pascal-parts',
            'cityscapes-parts', 'ade20k-full'} == set(C.CATALOGUE)


def test_cards_are_complete_and_their_sizes_are_the_published_ones():
    for card in C.CATALOGUE.values():
        assert card.what and card.terms and card.home and card.size and card.tree and '\n' not in card.terms
        for a in card.archives:
            assert re.fullmatch(r'https?://\S+\.(zip|tar|tgz)', a.url) and (a.checksum is None or re.fullmatch(
                r'md5:[0-9a-f]{32}|sha1:[0-9a-f]{40}', a.checksum))
    splits = {n: dict(c.splits) for n, c in C.CATALOGUE.items()}
    assert splits['pascal'] == dict(train=1464, train_aug=10582, val=1449, test=1456) and splits['pascal-parts'] == dict(val_parts=925)
    assert splits['cityscapes'] == dict(train=2975, val=500, test=1525) and splits['ade20k'] == dict(train=20210, val=2000)
    assert splits['cocostuff'] == dict(train=118287, val=5000) and splits['em'] == dict(train=20, val=10)


def test_nothing_there_shows_the_tree(tmp_path):
    text = C.table(tmp_path)
    for card in C.CATALOGUE.values():
        assert f'{card.name}: {card.what}' in text
        if card.name not in ('partscapes',): assert card.tree.strip().splitlines()[0] in text
    assert 'train 0 of 1464, train_aug 0 of 10582' in text and 'get it   scaleprotoseg data --download ade20k' in text


def test_real_data_are_counted(shared):
    there = {n: C.found(c, shared/'data') for n, c in C.CATALOGUE.items()}
    assert {s: f.images for s, f in there['camvid'].items()} == dict(train=367, val=101, test=233)
    assert not any(f.missing for n in ('camvid', 'em', 'partscapes') for f in there[n].values())
    assert there['ade20k']['val'] == C.Found(3, 2000, '1997 of 2000 images')
    assert there['pascal']['test'].images == 0 and 'test.txt does not exist' in there['pascal']['test'].missing
    text = C.describe(C.CATALOGUE['camvid'], shared/'data')
    assert 'train 367 of 367, val 101 of 101, test 233 of 233 images' in text and 'put it into' not in text


def test_broken_split_is_reported_not_raised(tmp_path, shared):
    from scaleprotoseg.data import open_dataset
    ds = open_dataset('camvid', 'val', root=shared/'data')
    (tmp_path/'val').mkdir()
    (tmp_path/'valannot').mkdir()
    for id in ds.ids[:2]: (tmp_path/f'val/{id}.jpg').symlink_to(ds._files(id)[0])
    (tmp_path/f'valannot/{ds.ids[0]}.png').symlink_to(ds._files(ds.ids[0])[1])
    f = C.found(C.CATALOGUE['camvid'], tmp_path)['val']
    assert f.images == 0 and f.missing.endswith(f'{ds.ids[1]}.png does not exist (1 of 2 label maps of split \'val\' are missing).')
