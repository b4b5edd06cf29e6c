# The graph of an experiment: training jobs, reading notebooks, report. `make reproduce` runs it.
# A job's only declared output is its final marker; run folders and resume states belong to the package.
from shlex import quote

from scaleprotoseg.contents import paper_notebooks
from scaleprotoseg.notebooks import notebook_parameters
from scaleprotoseg.recipes import recipes_of
from scaleprotoseg.schedule import Training

EXPERIMENT = config.get("experiment", "demo")
DATA_ROOT = config.get("data_root", "")
DEVICE = config.get("device", "auto")
PRECISION = config.get("precision", "32-true")
GPU = 0 if DEVICE == "cpu" else 1
RECIPES = {r.short_name: r for r in recipes_of(EXPERIMENT)}
TIMED = ("scaleprotoseg/table_10", "families/overview")   # they measure speed
ONLY_CPU = "CUDA_VISIBLE_DEVICES=-1 " if DEVICE == "cpu" else ""
PAPERS = [f"{paper}/{name}" for paper, name in paper_notebooks(EXPERIMENT)]


def marker(recipe, seed):
    """A changed recipe has another marker, so it is run (and refuses to overwrite the old results)."""
    return f"runs/{recipe.name}/seed{seed}/finished-{recipe.graph_digest()}.json"


def start(w):
    return [marker(t.recipe, t.seed) for t in Training(RECIPES[w.method], int(w.seed)).before]


MARKERS = [marker(r, seed) for r in RECIPES.values() for seed in r.seeds]


def time_limit(w, resources):
    """On a cluster, whose profile sets `runtime`: stop while there is time to save; `retries` continues."""
    minutes = resources.get("runtime")
    return f"--max-minutes {max(minutes - 10, minutes / 2):g}" if minutes else ""


def known_parameters(w, input):
    """Data and device, for a notebook that takes them."""
    known = notebook_parameters(input.notebook)
    given = {"data_root": quote(DATA_ROOT), "device": DEVICE} if DATA_ROOT else {"device": DEVICE}
    return " ".join(f"-p {k}={v}" for k, v in given.items() if k in known)


# gathers files that are there; no job of its own on a cluster
localrules:
    report,


wildcard_constraints:
    method="[^/]+",
    seed=r"\d+",
    digest="[0-9a-f]+",


rule all:
    input:
        # the markers too: results kept in git must not pass for those of this checkout
        MARKERS,
        f"figures/{EXPERIMENT}/report.html",


rule trained:
    input:
        MARKERS,


rule train:
    input:
        start,
    output:
        f"runs/{EXPERIMENT}/{{method}}/seed{{seed}}/finished-{{digest}}.json",
    # asked only on one machine: a training takes all of it; on a cluster the profile says how many cores a job has
    threads: lambda w: workflow.cores
    resources:
        gpu=GPU,
        mem_mb=16_000,
    params:
        method=lambda w: RECIPES[w.method].method,
        variant=lambda w: RECIPES[w.method].variant and f"--variant {RECIPES[w.method].variant}",
        data=f"--data-root {quote(DATA_ROOT)}" if DATA_ROOT else "",
        limit=time_limit,
    shell:
        "scaleprotoseg run {EXPERIMENT} {params.method} {params.variant} --seed {wildcards.seed} "
        "--device {DEVICE} --precision {PRECISION} {params.data} {params.limit} --marker {output}"


rule read:
    input:
        markers=MARKERS,
        notebook="nbs/paper/{paper}.ipynb",
    output:
        f"figures/{EXPERIMENT}/{{paper}}.ipynb",
    threads: lambda w: workflow.cores if w.paper in TIMED else 1
    resources:
        gpu=GPU,   # some measure trained models on all validation images
        mem_mb=8_000,
    params:
        known=known_parameters,
    shell:
        # as many threads as Snakemake counts: notebooks run side by side
        "{ONLY_CPU}OMP_NUM_THREADS={threads} scaleprotoseg notebook {input.notebook} {output} -p experiment={EXPERIMENT} {params.known}"


rule report:
    input:
        MARKERS,
        expand(f"figures/{EXPERIMENT}/{{paper}}.ipynb", paper=PAPERS),
    output:
        f"figures/{EXPERIMENT}/report.html",
    shell:
        "scaleprotoseg report {EXPERIMENT}"
