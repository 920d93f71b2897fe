"""What every command line shares: flags, `--gin.NAME=VALUE`, one-line errors, exit statuses."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from t5like.errors import UserError
from t5like.training import distributed

FLAGS = flags.FLAGS

flags.DEFINE_multi_string(
    "gin_file", [], "A gin page; repeatable, later pages override earlier ones. Paths under "
    "gin_configs/ are found from any directory."
)
flags.DEFINE_multi_string(
    "gin_bindings", [], "A gin binding, 'NAME = VALUE'; --gin.NAME=VALUE says the same."
)
flags.DEFINE_string("workdir", None, "Directory of the run (any path that etils.epath reads).")
flags.DEFINE_integer("seed", None, "Overrides train.seed.")
flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where a run has several processes and they are "
    "not detected (see docs/processes.md)."
)
flags.DEFINE_integer("num_processes", None, "How many processes the run has; 1: only this one.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_integer(
    "coordinator_timeout", distributed.JOIN_SECONDS, "Seconds that all processes have to come."
)


def rewrite_gin_arguments(argv: Sequence[str]) -> list[str]:
    """Turns `--gin.train.steps=20` into `--gin_bindings=train.steps = 20`."""
    rewritten = []
    for argument in argv:
        for prefix in ("--gin.", "-gin."):
            if argument.startswith(prefix):
                name, equals, value = argument[len(prefix):].partition("=")
                if not equals:
                    raise UserError(f"{argument} has no value: write --gin.{name}=VALUE")
                argument = f"--gin_bindings={name} = {value}"
                break
        rewritten.append(argument)
    return rewritten


def bindings() -> list[str]:
    """The command line's gin bindings, `--seed` among them."""
    extra = [] if FLAGS.seed is None else [f"train.seed = {FLAGS.seed}"]
    return list(FLAGS.gin_bindings) + extra


def join_processes() -> None:
    """Finds the other processes of this run; before anything that may ask jax for a device."""
    distributed.initialize(
        FLAGS.coordinator,
        FLAGS.num_processes,
        FLAGS.process_id,
        timeout=FLAGS.coordinator_timeout,
    )


def no_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError if there is a positional argument, for commands that take none."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: flags start with --")


def complain(error: Exception) -> None:
    """Prints an error as one line on standard error."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses flags, calls `main(positional arguments)`, and exits with its status.

    A UserError, or a file that cannot be read or written, ends in one line and status 1 (75 for
    what a restart cures). Other exceptions keep their traceback: they are ours to mend. Of
    several processes, the end of one in an error is that of all.
    """

    def guarded(argv: list[str]) -> None:
        if not FLAGS["verbosity"].present:
            # Libraries log every save at INFO; `--verbosity=0` shows it.
            logging.set_verbosity(logging.WARNING)
        problem: BaseException | None = None
        try:
            status = main(argv[1:])
        except UserError as error:
            problem, status = error, getattr(error, "exit_status", 1)
        except BrokenPipeError:
            sys.stderr.close()
            status = 141
        except OSError as error:
            if error.filename is None:
                _tell_others(error)
                raise
            problem, status = UserError(f"{error.strerror}: {error.filename}"), 1
        except KeyboardInterrupt:
            problem, status = UserError("interrupted; run the same command again to go on"), 130
        except Exception as error:
            _tell_others(error)
            raise
        if problem is not None:
            complain(problem)
        _end(problem, status or 0)

    def _end(problem: BaseException | None, status: int) -> None:
        if distributed.process_count() == 1:
            sys.exit(status)
        if status in (0, 143):
            distributed.leave()
            sys.exit(status)
        distributed.failed(str(problem or "its own words say why"), status)
        with contextlib.suppress(OSError):  # Nobody reads any more.
            sys.stdout.flush()
        # Python's own way out would wait for processes that will not come.
        os._exit(status)

    def _tell_others(error: Exception) -> None:
        if distributed.process_count() > 1:
            distributed.wait_for_the_reason(error)
            traceback.print_exc()
            _end(UserError(f"{type(error).__name__}: {error}"), 1)

    if importlib.util.find_spec("gcsfs"):
        # For gs:// epath would rather load TensorFlow, which takes all GPUs for itself.
        os.environ.setdefault("EPATH_USE_TF", "false")
    try:
        argv = rewrite_gin_arguments(sys.argv)
    except UserError as error:
        complain(error)
        sys.exit(1)
    app.run(guarded, argv=argv)
