"""Compiles a run's train step, and its decoding, for hardware that is not here: will it fit, how
fast can it be.

    python launch/compile.py --gin_file=gin_configs/runs/t5_1_1_base_c4.gin --topology=v5e:4x4 \\
      --gin.ModelConfig.vocab_size=32128

Topologies: TPU slices by shape (v5e:16x16, v4:2x2x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1) or by size
(v5e-256 counts chips; v5p-128 counts TensorCores, two a chip), h100:8 or h100:64, `local` for the
devices of this machine and local:8 for eight CPU devices. TPUs need the extra `tpu`, an H100
`cuda12`; no data, no vocabulary files (set ModelConfig.vocab_size) and no accelerator are needed.

Prints memory, FLOPs, bytes, collectives and a roofline, and saves them as compile.json in
--workdir. What the numbers mean: docs/compile.md.

Exit status: 0 it fits; 1 it does not, after the report, or an error that you can mend.
"""

from __future__ import annotations

import json

from absl import flags

from launch import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags, when it is the one that runs: others have some of the names."""
    flags.DEFINE_string("topology", "local", "What to compile for, see above.")
    flags.DEFINE_bool("generate", True, "Compile decoding too, where the model can generate.")
    flags.DEFINE_integer(
        "generate_batch", 0, "Prompts decoded at once; 0: one for each part of a batch.",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_integer("max_new_tokens", 64, "Tokens that decoding adds.", lower_bound=1)
    flags.DEFINE_integer(
        "tries", 1, "Settings that are tried by compiling where the run does not fit.",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_string("save_hlo", None, "A folder for the optimised programs as text.")
    flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> int:
    from launch.compiling import topology as topology_lib

    cli.no_arguments(arguments)
    topology = topology_lib.parse(FLAGS.topology)
    topology_lib.prepare(topology)

    from etils import epath

    from launch import config as config_lib
    from launch.compiling import report, session
    from launch.files import write_whole

    resolved = config_lib.load(FLAGS.gin_file, cli.bindings())
    asked = session.Asked(
        FLAGS.generate, FLAGS.generate_batch, FLAGS.max_new_tokens, FLAGS.tries, FLAGS.save_hlo
    )
    record = session.compile_run(resolved.run, topology, asked)
    for line in report.lines(record):
        print(line)
    if FLAGS.workdir is not None:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(epath.Path(FLAGS.workdir) / "compile.json", text)
    if record["advice"] is None:
        return 0
    cli.complain(RuntimeError(record["advice"]["summary"]))
    return 1


if __name__ == "__main__":
    define_flags()
    cli.run(main)
