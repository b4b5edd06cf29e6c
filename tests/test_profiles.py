"""A sweep on a cluster: the profiles, dry runs, and runs with stand-ins for the commands of Slurm and Kubernetes."""
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from stand_ins import COMMANDS

from scaleprotoseg.recipes import find_recipe, recipes_of
from scaleprotoseg.schedule import trainings

ROOT = Path(__file__).parents[1]
PROFILES = {p.parent.name: yaml.safe_load(p.read_text()) for p in sorted((ROOT / 'profiles').glob('*/config.yaml'))}
RULES = set(re.findall(r'^rule (\w+):', (ROOT / 'Snakefile').read_text(), re.M))


def snakemake(*args, cwd=ROOT, **env):
    done = subprocess.run([sys.executable, '-m', 'snakemake', *args], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def dry_run(folder, experiment, profile='', target='all', **config):
    """The jobs that would run, as (rule, wildcards, threads, resources, command); needs no executor, for that part of the profile is left out."""
    shared = {k: v for k, v in PROFILES.get(profile, {}).items() if not k.startswith(('executor', f'{PROFILES[profile]["executor"]}-'))}
    (folder / 'config.yaml').write_text(yaml.safe_dump(shared))
    said = snakemake('--dry-run', '--forceall', '--printshellcmds', '--cores', '64', '--profile', str(folder),
                     '--config', f'experiment={experiment}', *(f'{k}={v}' for k, v in config.items()), '--', target)
    line = r'(?:    \w.*\n)*'
    block = rf'^(?:local)?rule (\w+):\n{line}?(?:    wildcards: (.+)\n)?(?:    threads: (\d+)\n)?    resources: (.+)\nShell command: (.+)$'
    pairs = lambda text: dict(x.split('=', 1) for x in text.split(', ')) if text else {}
    return [(rule, pairs(w), int(threads or 1), pairs(r), command) for rule, w, threads, r, command in re.findall(block, said, re.M)]


@pytest.mark.parametrize('name', PROFILES)
def test_a_profile_names_only_what_there_is(name):
    from snakemake.cli import get_argument_parser
    profile, known = PROFILES[name], get_argument_parser()._option_string_actions
    own = f'{profile["executor"]}-'
    installed = any(o.startswith(f'--{own}') for o in known)
    assert not [k for k in profile if f'--{k}' not in known and (installed or not k.startswith(own))]
    assert set(profile['set-threads']) | set(profile['set-resources']) <= RULES
    assert {r for rule in profile['set-resources'].values() for r in rule} == {'runtime'}
    extra = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']['cluster']
    assert any(e.startswith(f'snakemake-executor-plugin-{profile["executor"]}>=') for e in extra)


def test_the_clusters_differ_only_in_how_jobs_are_submitted():
    slurm, kubernetes = ({k: v for k, v in p.items() if not k.startswith(('executor', 'cluster-generic-'))} for p in PROFILES.values())
    assert slurm == kubernetes


def test_a_job_waits_for_the_trainings_that_share_its_first_stages():
    said = snakemake('--dry-run', '--forceall', '--cores', '1', '--config', 'experiment=smoke', '--', 'trained')
    name = lambda path: path.split('/')[2]
    jobs = {name(made): {name(p) for p in before.split(', ') if p} for before, made in
            re.findall(r'^rule train:\n(?:    input: (.+)\n)?    output: (.+)$', said, re.M)}
    assert jobs == {t.recipe.short_name: {b.recipe.short_name for b in t.before} for t in trainings('smoke')}
    assert jobs['scaleprotoseg-veto'] == {'pretrain', 'scaleprotoseg'} and not jobs['pretrain']


@pytest.mark.parametrize('experiment, target, data_root', [('em', 'trained', '/data'), ('pascal-ablations', 'all', '')])
def test_every_method_and_seed_is_a_job_with_limits(tmp_path, experiment, target, data_root):
    jobs = dry_run(tmp_path, experiment, 'slurm', target, device='cuda', precision='bf16-mixed', data_root=data_root)
    trainings = [j for j in jobs if j[0] == 'train']
    first = [find_recipe(experiment, r.init) for r in recipes_of(experiment) if r.init]      # what they start from
    expected = {(r.short_name, str(seed)) for r in [*recipes_of(experiment), *first] for seed in r.seeds}
    assert {(w['method'], w['seed']) for _, w, *_ in trainings} == expected and len(trainings) == len(expected)
    for _, w, threads, resources, command in trainings:
        assert threads == 8 and resources.items() >= {'gpu': '1', 'mem_mb': '16000', 'runtime': '1440'}.items()
        place = f'--data-root {data_root}' if data_root else ''
        assert f'--seed {w["seed"]} --device cuda --precision bf16-mixed {place} --max-minutes 1430 --marker runs/{experiment}/' in command
    readings = [j for j in jobs if j[0] == 'read']
    assert bool(readings) == (target == 'all') and all(threads == 4 and r['runtime'] == '240' and 'OMP_NUM_THREADS=4' in command for *_, threads, r, command in readings)


def test_on_one_machine_a_training_has_all_cores_and_no_limit(tmp_path):
    trainings = [j for j in dry_run(tmp_path, 'smoke', device='cpu') if j[0] == 'train']
    assert trainings
    for _, _, threads, resources, command in trainings:
        assert threads == 64 and resources['gpu'] == '0' and 'runtime' not in resources and '--max-minutes' not in command


def test_notebooks_that_measure_speed_have_the_machine_for_themselves(tmp_path):
    readings = {w['paper']: (threads, command) for rule, w, threads, _, command in dry_run(tmp_path, 'smoke', device='cpu') if rule == 'read'}
    assert {p for p, (threads, _) in readings.items() if threads == 64} == {'scaleprotoseg/table_10', 'families/overview'}
    assert all(threads in (1, 64) and 'CUDA_VISIBLE_DEVICES=-1 OMP_NUM_THREADS' in command for threads, command in readings.values())


@pytest.fixture
def cluster(tmp_path):
    """Environment whose commands are the stand-ins; they note what they were asked for in `notes`."""
    (tmp_path / 'bin').mkdir(), (tmp_path / 'notes').mkdir()
    for c in COMMANDS:
        path = tmp_path / 'bin' / c.__name__
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_ins.py")} {c.__name__} "$@"\n')
        path.chmod(0o755)
    return {'PATH': f'{tmp_path}/bin{os.pathsep}{os.environ["PATH"]}', 'CLUSTER': str(tmp_path / 'notes'),
            'IMAGE': 'registry/image:1', 'CLAIM': 'results', 'VOLUME': str(tmp_path)}


def asked(cluster): return [json.loads(p.read_text()) for p in sorted(Path(cluster['CLUSTER']).glob('*.json'))]


def continued(tmp_path, cluster, profile, *options):
    """Run a training that needs two jobs, and what it starts from, on the stand-in of a cluster; returns the jobs."""
    for name in ('Snakefile', 'profiles', 'settings.ini', 'nbs'): (tmp_path / name).symlink_to(ROOT / name)
    recipe = find_recipe('smoke', 'protoseg')
    markers = [f'runs/{r.name}/seed0/finished-{r.graph_digest()}.json' for r in (find_recipe('smoke', recipe.init), recipe)]
    snakemake('--profile', f'profiles/{profile}', '--latency-wait', '1', *options, '--config', 'experiment=smoke', '--', markers[1], cwd=tmp_path, **cluster)
    assert all((tmp_path / m).is_file() for m in markers)
    jobs, calls = asked(cluster), [json.loads(x) for x in (tmp_path / 'notes/calls').read_text().splitlines()]
    assert [j['failed'] for j in jobs] == [True, False, True, False]
    assert [c['args'] for c in calls[::2]] == [c['args'] for c in calls[1::2]] and len({c['job'] for c in calls}) == 4
    assert [c['args'][c['args'].index('--marker') + 1] for c in calls[::2]] == markers
    assert all(c['args'][c['args'].index('--max-minutes') + 1] == '1430' for c in calls)
    assert {c['threads'] for c in calls} == {str(min(8, len(os.sched_getaffinity(0))))}
    return jobs


@pytest.mark.slow
def test_slurm_continues_what_ran_out_of_time(tmp_path, cluster):
    pytest.importorskip('snakemake_executor_plugin_slurm')
    for job in continued(tmp_path, cluster, 'slurm', '--slurm-init-seconds-before-status-checks', '1'):
        assert ' -p gpu -t 1440 --mem 16000 ' in ' '.join(job['asked'])
        assert {'--cpus-per-task=8', '--gpus=1'} <= set(job['asked'])


@pytest.mark.slow
def test_kubernetes_continues_what_ran_out_of_time(tmp_path, cluster):
    pytest.importorskip('snakemake_executor_plugin_cluster_generic')
    for job in continued(tmp_path, cluster, 'kubernetes', '--seconds-between-status-checks', '1'):
        assert job['asked']['metadata']['generateName'] == 'scaleprotoseg-train-'


def test_a_job_of_kubernetes_has_its_resources_and_the_volume(tmp_path, cluster):
    (tmp_path / 'job.sh').write_text('exit $(test -f job.sh)')
    call = lambda *args: subprocess.run([ROOT / 'profiles/kubernetes' / args[0], *args[1:]], cwd=tmp_path, env={**os.environ, **cluster},
                                        capture_output=True, text=True, check=True).stdout.strip()
    name = call('submit', 'read', '4', '8000', '1', '240', str(tmp_path / 'job.sh'))
    job, = asked(cluster)
    pod = job['asked']['spec']['template']['spec']
    box, = pod['containers']
    assert box['workingDir'] == str(tmp_path) and box['image'] == 'registry/image:1' and pod['activeDeadlineSeconds'] == 240 * 60
    assert box['resources'] == {'requests': {'cpu': 4, 'memory': '8000M'}, 'limits': {'memory': '8000M', 'nvidia.com/gpu': 1}}
    assert {m['name']: m['mountPath'] for m in box['volumeMounts']}['shared'] == str(tmp_path)
    assert {v['name']: v for v in pod['volumes']}['shared']['persistentVolumeClaim'] == {'claimName': 'results'}
    assert call('status', name) == 'success' and call('cancel', name) == ''
    (tmp_path / 'notes/7.log').touch()
    assert call('status', 'job.batch/7') == 'running' and call('status', 'job.batch/deleted') == 'failed'
    (tmp_path / 'bin/kubectl').write_text('#!/bin/sh\nexit 1\n')
    assert call('status', name) == 'running', 'a server that does not answer'
