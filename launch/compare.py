"""Trains several configurations under one budget and measures them alike.

    python launch/compare.py --gin_file=gin_configs/papers/objectives_at_equal_compute.gin \\
        --workdir=runs/compare

Writes comparison.json, comparison.md (the table, also printed) and comparison.png to the workdir,
anew after every run, so that what is there is always whole. Run again after an interruption: runs
that are done are kept, the one that was cut short resumes; changed measures are taken again of
runs that are trained. Bindings on the command line are of the comparison
(`--gin.compare.seeds=[0]`); what a run is made of stands in compare.runs.

Exit status: as launch/train.py's.
"""

from __future__ import annotations

from absl import flags

from launch import cli
from t5like.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> int:
    cli.no_arguments(arguments)
    if FLAGS.workdir is None:
        raise UserError("no workdir: pass --workdir=DIR, where the comparison will live")
    if FLAGS.seed is not None:
        raise UserError("a comparison has several seeds: pass --gin.compare.seeds=[0,1,2]")

    from etils import epath

    from launch import config
    from launch.comparison.trials import trials
    from launch.compilations import keep_compilations
    from launch.training import stoppable

    compare = config.load(FLAGS.gin_file, FLAGS.gin_bindings, root="compare").run
    workdir = epath.Path(FLAGS.workdir)
    planned = trials(compare, workdir)
    # Runs that differ by their seed alone compile once.
    keep_compilations(workdir / "cache")
    return stoppable(lambda: run_all(compare, planned, workdir))


def run_all(compare, planned, workdir) -> int:
    """Makes the runs that are not done yet; writes the report before the first and after each."""
    from launch.comparison import report, runs

    done = {(t.name, t.seed): runs.finished(compare, t) for t in planned}
    for number, trial in enumerate(planned, 1):
        print(f"[{number}/{len(planned)}] {trial.name}, seed {trial.seed}", flush=True)
        if done[trial.name, trial.seed] is None:
            done[trial.name, trial.seed] = runs.run(compare, trial)
            report.write(compare, by_run(compare, done), workdir)
    print(report.write(compare, by_run(compare, done), workdir))
    return 0


def by_run(compare, done) -> dict[str, dict[int, dict]]:
    """{run: {seed: result}} of what is done, in the order of compare.runs."""
    found = {
        name: {seed: done[name, seed] for seed in compare.seeds if done[name, seed] is not None}
        for name in compare.runs
    }
    return {name: results for name, results in found.items() if results}


if __name__ == "__main__":
    cli.run(main)
