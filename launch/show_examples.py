"""Prints what the model will really see.

    python launch/show_examples.py --gin_file=gin_configs/runs/quickstart.gin --n=3
    python launch/show_examples.py --gin_file=gin_configs/runs/quickstart.gin \\
        --gin_file=gin_configs/objectives/mlm.gin --input=notes.txt --format=jsonl

Each example is shown alone in its row, also where the run packs several; of a run that trains
several objectives by turns, each is shown by turns. With --mask, who sees whom is drawn too.
Formats: `text`, styled for a terminal; `jsonl`, one object a line:
{"index", "objective", "window": [ids before corruption], "features": {name: [ids]},
"text": {name: string}}, and with --mask
"mask": {"encoder" or "decoder" or "decoder to encoder": [for each query a string of 0 and 1]}.
Where examples have several members, features, texts and masks are lists with one for each.
"""

from __future__ import annotations

import itertools
import json

from absl import flags

from launch import cli

FLAGS = flags.FLAGS
DEFAULT_PAGE = "gin_configs/runs/quickstart.gin"
LOOKS = {
    "given": "",
    "target": "green",
    "sentinel": "bold black on {hue}",
    "span": "{hue}",
    "named": "bold white on purple4",
    "special": "bold cyan",
    "mask": "bold black on white",
    "random": "black on bright_red",
    "kept": "underline green",
    "quiet": "dim",
}
# Of a sentinel and its span, by the sentinel's number.
HUES = ("yellow", "bright_cyan", "bright_magenta", "bright_blue", "orange3", "bright_green")


def define_flags() -> None:
    """Defines this command's flags, when it is the one that runs: others have some of the names."""
    flags.DEFINE_integer("n", 4, "Examples to print.", lower_bound=0)
    flags.DEFINE_enum("format", "text", ["text", "jsonl"], "How to print them.")
    flags.DEFINE_bool("mask", False, "Show who sees whom, too.")
    flags.DEFINE_string(
        "input", None, "A text or .jsonl file (also .gz) to read instead of the configured corpus, "
        "in its own order; its text is taken from the field `text` of JSON lines."
    )  # fmt: skip
    flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> int:

    cli.no_arguments(arguments)
    pipelines = assemble_pipelines(
        FLAGS.gin_file or [DEFAULT_PAGE], cli.bindings(), FLAGS.workdir, FLAGS.input
    )
    drawn = itertools.islice(by_turns(pipelines), FLAGS.n)
    show = print_jsonl if FLAGS.format == "jsonl" else print_text
    show(drawn, FLAGS.mask)
    return 0


def by_turns(pipelines):
    """Yields (t5like.data.pipeline.Drawn, its pipeline) of each track, one after the other."""
    streams = [(pipeline.examples(), pipeline) for pipeline in pipelines.values()]
    while True:
        yield from ((next(examples), pipeline) for examples, pipeline in streams)


def assemble_pipelines(gin_files, bindings, workdir: str | None, path: str | None):
    """Track -> training pipeline of the configuration, over the file `path` if there is one."""
    from launch import assemble, config

    run = config.load(gin_files, bindings).run
    if path is not None:
        run = read_instead(run, path, workdir)
    return assemble.assemble_data(run, workdir, progress=False).pipelines


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


def print_jsonl(examples, mask: bool) -> None:
    """One JSON object a line for each (t5like.data.pipeline.Drawn, its pipeline)."""
    from objectives import show, show_mask

    for drawn, pipeline in examples:
        row = show.laid_out(drawn.example, pipeline)
        record = show.as_json(drawn, row, pipeline.vocabulary)
        if mask:
            record["mask"] = show_mask.as_json(row)
        print(json.dumps(record, ensure_ascii=False))


def print_text(examples, mask: bool) -> None:
    """Styled text, and a legend of the styles that occurred."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from objectives import show, show_mask, show_reader

    console = Console(highlight=False)
    used = set()
    for drawn, pipeline in examples:
        row = show.laid_out(drawn.example, pipeline)
        console.print(
            Text(f"{drawn.index}  {drawn.component.name}  ({sizes(row)})", style="bold underline")
        )
        table = Table(box=rich.box.SIMPLE_HEAD, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, runs in show.as_lines(drawn, row, pipeline.vocabulary):
            table.add_row(label, styled(runs))
            used |= {style.split()[0] for _, style in runs}
        console.print(table)
        if mask:
            for title, runs in show_mask.pictures(row, show.reader_for(drawn, pipeline.vocabulary)):
                console.print(Text(f"  {title}", style="bold"))
                console.print(styled(runs), no_wrap=True)
    legend = [
        (f" {show_reader.STYLES[s]} ", s) for s in LOOKS if s in used and show_reader.STYLES[s]
    ]
    if legend:
        console.print(styled(itertools.chain.from_iterable((x, ("  ", "given")) for x in legend)))


def styled(runs):
    """Runs as one rich Text."""
    from rich.text import Text

    def look(style: str) -> str:
        name, _, number = style.partition(" ")
        return LOOKS[name].format(hue=HUES[int(number or 0) % len(HUES)])

    return Text.assemble(*((text, look(style)) for text, style in runs))


def sizes(row) -> str:
    """Used and available slots of each stack, and how many targets count."""
    parts = []
    for name, ids in row.items():
        if name.endswith("_segment_ids"):
            stack = name.removesuffix("_segment_ids")
            used = "+".join(str(n) for n in (ids > 0).sum(-1, keepdims=True).ravel())
            parts.append(f"{stack} {used} of {ids.shape[-1]}")
    predicted = sum(int((x > 0).sum()) for name, x in row.items() if name.endswith("loss_weights"))
    parts.append(f"{predicted} predicted")
    return ", ".join(parts)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
