"""Trains: `python launch/train.py --gin_file=gin_configs/runs/quickstart.gin --workdir=DIR`.

Pages compose left to right, later ones override: add gin_configs/objectives/mlm.gin after a run
page and the same run learns by masked language modelling. Rerunning a command resumes its run.
On several machines it is the same command in each process; see docs/processes.md.

Exit status: 0 done; 1 an error that you can mend; 143 stopped by SIGTERM with the state saved;
75 stopped in a way that a restart cures.
"""

from __future__ import annotations

from absl import flags

from launch import cli

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> int:
    from launch.training import train
    from t5like.errors import UserError

    cli.no_arguments(arguments)
    if FLAGS.workdir is None:
        raise UserError("no workdir: pass --workdir=DIR, where the run will live")
    cli.join_processes()
    return train(FLAGS.gin_file, cli.bindings(), FLAGS.workdir)


if __name__ == "__main__":
    cli.run(main)
