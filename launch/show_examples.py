"""Prints what the model will really see.

    python launch/show_examples.py --gin_file=gin_configs/runs/quickstart.gin --n=3
    python launch/show_examples.py --gin_file=gin_configs/runs/quickstart.gin \\
        --gin_file=gin_configs/objectives/mlm.gin --input=notes.txt --format=jsonl

Each example is shown alone in its row, also where the run packs several. Formats: `text`, styled
for a terminal; `jsonl`, one object a line:
{"index", "objective", "window": [ids before corruption], "features": {name: [ids]},
"text": {name: string}}.
"""

from __future__ import annotations

import itertools
import json

from absl import flags

from launch import cli

FLAGS = flags.FLAGS
flags.DEFINE_integer("n", 4, "Examples to print.", lower_bound=0)
flags.DEFINE_enum("format", "text", ["text", "jsonl"], "How to print them.")
flags.DEFINE_string(
    "input", None, "A text or .jsonl file (also .gz) to read instead of the configured corpus, in "
    "its own order; its text is taken from the field `text` of JSON lines."
)  # fmt: skip
flags.adopt_module_key_flags(cli)

DEFAULT_PAGE = "gin_configs/runs/quickstart.gin"
LOOKS = {
    "given": "",
    "target": "green",
    "sentinel": "bold black on bright_yellow",
    "special": "bold cyan",
    "mask": "bold black on bright_yellow",
    "random": "black on bright_red",
    "kept": "underline green",
    "quiet": "dim",
}


def main(arguments: list[str]) -> int:
    from t5like.errors import UserError

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: flags start with --")
    pipeline = assemble_pipeline(
        FLAGS.gin_file or [DEFAULT_PAGE], cli.bindings(), FLAGS.workdir, FLAGS.input
    )
    drawn = itertools.islice(pipeline.examples(), FLAGS.n)
    show = print_jsonl if FLAGS.format == "jsonl" else print_text
    show(drawn, pipeline)
    return 0


def assemble_pipeline(gin_files, bindings, workdir: str | None, path: str | None):
    """The configured training pipeline, over the file `path` if there is one."""
    from launch import assemble, config

    run = config.load(gin_files, bindings).run
    if path is not None:
        run = read_instead(run, path, workdir)
    return assemble.assemble_data(run, workdir, progress=False).pipeline


def read_instead(run, path: str, workdir: str | None):
    """The run with the file as its corpus and its vocabulary as it is (trained on its own text)."""
    import dataclasses

    from launch import assemble
    from t5like.data.sources import JsonlSource, TextSource

    is_jsonl = path.removesuffix(".gz").endswith((".jsonl", ".json"))
    vocabulary = assemble.resolve_vocabulary(run, assemble.cache_directory(run, workdir))
    return dataclasses.replace(
        run,
        source=JsonlSource(path) if is_jsonl else TextSource(path),
        rates=None,
        vocabulary=vocabulary,
        shuffle=False,
    )


def print_jsonl(examples, pipeline) -> None:
    """One JSON object a line for each t5like.data.pipeline.Drawn."""
    from objectives import show

    for drawn in examples:
        row = show.laid_out(drawn.example, pipeline)
        print(json.dumps(show.as_json(drawn, row, pipeline.vocabulary), ensure_ascii=False))


def print_text(examples, pipeline) -> None:
    """Styled text, and a legend of the styles that occurred."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from objectives import show

    console = Console(highlight=False)
    used = set()
    for drawn in examples:
        row = show.laid_out(drawn.example, pipeline)
        table = Table(
            box=rich.box.SIMPLE_HEAD, show_header=False, title_justify="left",
            title=Text(f"{drawn.index}  {drawn.component.name}  ({sizes(row)})", style="bold"),
        )  # fmt: skip
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, runs in show.as_runs(drawn, row, pipeline.vocabulary):
            table.add_row(label, Text.assemble(*((text, LOOKS[style]) for text, style in runs)))
            used |= {style for _, style in runs}
        console.print(table)
    legend = [(f" {show.STYLES[s]} ", LOOKS[s]) for s in LOOKS if s in used and show.STYLES[s]]
    if legend:
        console.print(Text.assemble(*itertools.chain.from_iterable((x, "  ") for x in legend)))


def sizes(row) -> str:
    """Used and available slots of each stack, and how many targets count."""
    parts = []
    for name, ids in row.items():
        if name.endswith("_segment_ids"):
            stack = name.removesuffix("_segment_ids")
            parts.append(f"{stack} {int((ids > 0).sum())} of {len(ids)}")
    predicted = sum(int((x > 0).sum()) for name, x in row.items() if name.endswith("weights"))
    parts.append(f"{predicted} predicted")
    return ", ".join(parts)


if __name__ == "__main__":
    cli.run(main)
