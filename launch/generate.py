"""Generates text with a trained run.

    python launch/generate.py --workdir=runs/quickstart --infill 'for ____ in range(10):'
    python launch/generate.py --workdir=RUN --temperature=0.8 --top_p=0.9 'Once upon a time'
    python launch/generate.py --workdir=RUN --input=prompts.jsonl --format=jsonl --output=out.jsonl

Prompts come from the arguments, else from --input, else from standard input: one a line, or
JSON lines with the prompt in the field "prompt" or "text". Prompts are continued: a decoder goes on
in the row of the prompt, an encoder-decoder reads it in its encoder. With --infill the blanks of a
prompt (____ or <extra_id_0>, ...) are filled, in the way of the run's objective: span corruption,
UL2, CodeGen2 or, for a single blank, FIM. Samples depend on --seed (0 by default) and the prompt's
number, not on what else is asked for.

Formats: `text` prints each prompt with what was generated in its place; `jsonl` one object for
each sequence: {"index", "sample", "prompt", "text", "completion" or "fills" and "well_formed",
"log_prob", "score", "ended"}.
"""

from __future__ import annotations

from absl import flags

from launch import cli, prompts as prompts_lib
from t5like.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags, when it is the one that runs: others have some of the names."""
    flags.DEFINE_bool(
        "infill", False, "Fill the blanks of the prompts instead of going on from them."
    )
    flags.DEFINE_string("input", None, "A file of prompts, lines or .jsonl, also .gz; - for stdin.")
    flags.DEFINE_string("output", None, "A file to write instead of standard output.")
    flags.DEFINE_enum("format", "text", ["text", "jsonl"], "How to write results.")
    flags.DEFINE_integer("max_new_tokens", 64, "Longest result in tokens, EOS included.")
    flags.DEFINE_float(
        "temperature", None, "Divides the logits; 0 is greedy. By default 1 where --num_samples, "
        "--top_k or --top_p asks for sampling, else 0."
    )  # fmt: skip
    flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens; 0: from all.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that make up this mass.")
    flags.DEFINE_integer("beams", 0, "Beam search with this many beams; 0: none.")
    flags.DEFINE_float("alpha", 0.6, "Beam search: ranks by log-probability / ((5 + n) / 6)^alpha.")
    flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.")
    flags.DEFINE_integer("batch_size", 16, "Most prompts decoded at once.", lower_bound=1)
    flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> int:
    if FLAGS.workdir is None:
        raise UserError("no workdir: pass --workdir=DIR of a run that has saved a checkpoint")
    prompts = prompts_lib.read_prompts(arguments, FLAGS.input)
    decoding = decoding_from_flags()

    from launch.compilations import keep_compilations
    from launch.runs import load_run
    from t5like.inference.generate import Generator

    run = load_run(FLAGS.workdir, FLAGS.gin_file, cli.bindings())
    if run.cache is not None:
        keep_compilations(run.cache)
    generator = Generator(
        run.model, run.params, run.vocabulary, run.bidirectional_inputs, FLAGS.batch_size
    )
    infill_format = run.infilling() if FLAGS.infill else None
    records = list(generate(generator, prompts, decoding, FLAGS.seed or 0, infill_format))
    show = prompts_lib.as_jsonl if FLAGS.format == "jsonl" else prompts_lib.as_text
    prompts_lib.write(show(records), FLAGS.output)
    return 0


def decoding_from_flags():
    """The flags as a Decoding; 0 for top_k and 1 for top_p mean off."""
    from t5like.inference.generate import Decoding
    from t5like.inference.sampling import Sampling

    top_k = FLAGS.top_k or None
    top_p = None if FLAGS.top_p == 1 else FLAGS.top_p
    temperature = FLAGS.temperature
    if temperature is None:
        temperature = 1.0 if FLAGS.num_samples > 1 or top_k or top_p is not None else 0.0
    sampling = Sampling(temperature, top_k, top_p)
    return Decoding(FLAGS.max_new_tokens, sampling, FLAGS.num_samples, FLAGS.beams, FLAGS.alpha)


def generate(generator, prompts: list[str], decoding, seed: int, infill_format=None):
    """Yields one record (a dict as in the module's docstring) for each sequence.

    Args:
      infill_format: fill the prompts' blanks in this way (see LoadedRun.infilling); None: continue
        the prompts.
    """
    if infill_format is not None:
        from t5like.inference.infill import infill

        results = infill(generator, prompts, infill_format, decoding, seed=seed)
    else:
        results = generator.complete(prompts, decoding, seed=seed)
    for index, (prompt, found) in enumerate(zip(prompts, results, strict=True)):
        for sample, result in enumerate(found):
            record = {"index": index, "sample": sample, "prompt": prompt}
            if infill_format is not None:
                completion = result.completion
                record["text"] = result.text
                record["fills"] = list(result.fills)
                record["well_formed"] = result.well_formed
            else:
                completion = result
                record["text"] = prompt + result.text
                record["completion"] = result.text
            yield record | {
                "log_prob": completion.log_prob,
                "score": completion.score,
                "ended": completion.ended,
            }


if __name__ == "__main__":
    define_flags()
    cli.run(main)
