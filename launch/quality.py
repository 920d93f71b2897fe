"""What a run shows a newcomer at its end: does the model use its input, and what does it write?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.assemble import Data
from launch.files import write_whole
from launch.networks import Network
from t5like.data.examples import Seq2Seq
from t5like.data.pipeline import Pipeline
from t5like.evaluation.input_use import InputUse, measure_input_use
from t5like.inference.generate import Decoding, Generator
from t5like.inference.infill_formats import parse_spans

_INFILLS = 3
# Examples among which infills are looked for: those of some objectives have no sentinels.
_SEARCHED = 4000


def report(
    data: Data, network: Network, pipeline: Pipeline, params, workdir: str,
    limit: int | None = None,
) -> None:
    """Prints three losses and three infills on held-out text, and writes quality.json.

    Only an encoder-decoder has an input apart from its own past; for others there is nothing
    to report.
    """
    if data.model.architecture != "encoder_decoder":
        return
    use = measure_input_use(
        lambda params, batch: network.module.apply({"params": params}, batch, train=False),
        params,
        pipeline.one_pass(limit),
        data.vocabulary.special_ids,
    )
    text = json.dumps(dataclasses.asdict(use)) + "\n"
    write_whole(epath.Path(workdir) / "quality.json", text)
    console = Console()
    console.print(losses_table(use))
    for shown in infills(data, pipeline, params):
        console.print(shown, soft_wrap=False)


def losses_table(use: InputUse) -> Table:
    """The three numbers and what they mean."""
    table = Table(title="On held-out text, nats a content token", box=box.SIMPLE, title_style="")
    table.add_column("")
    table.add_column("loss", justify="right")
    table.add_column("against the model", justify="right")
    rows = [
        ("the model", use.loss),
        ("the model, given another example's input", use.wrong_input_loss),
        ("unigram entropy: token frequencies alone", use.unigram_entropy),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:.3f}", f"{value - use.loss:+.3f}")
    return table


def infills(data: Data, pipeline: Pipeline, params) -> Iterator[Text]:
    """Held-out texts with their blanks as the model fills them, and what stood there."""
    examples = list(itertools.islice(_readable(data, pipeline), _INFILLS))
    if not examples:
        return
    generator = Generator(data.model, params["model"], data.vocabulary)
    decoding = Decoding(max_new_tokens=max(len(e.targets) for e in examples) + 8)
    answers = generator.generate([e.inputs for e in examples], decoding)
    sentinels = data.vocabulary.sentinels
    for number, (example, (answer, *_)) in enumerate(zip(examples, answers, strict=True), 1):
        blanks = int(np.isin(example.inputs, sentinels).sum())
        said, _ = parse_spans(answer.tokens, sentinels, blanks)
        truth, _ = parse_spans(example.targets[:-1], sentinels, blanks)
        yield _filled(data.vocabulary, number, example.inputs, said, truth)


def _readable(data: Data, pipeline: Pipeline) -> Iterator[Seq2Seq]:
    """Examples spread over the held-out text, so that they come from different documents."""
    for index in range(5, _SEARCHED, 37):
        example = next(pipeline.examples(index)).example
        if np.isin(example.inputs, data.vocabulary.sentinels).any():
            yield example


def _filled(
    vocabulary, number: int, inputs: np.ndarray, said: Sequence, truth: Sequence
) -> Text:
    text = Text(f"\nInfill {number} ", style="bold")
    text.append("(green: the model's words; in brackets: what stood there instead)\n", style="dim")
    blanks = np.flatnonzero(np.isin(inputs, vocabulary.sentinels))
    start = 0
    for blank, (here, there) in zip(blanks, zip(said, truth, strict=True), strict=True):
        text.append(vocabulary.decode(inputs[start:blank]))
        said_here, stood_there = vocabulary.decode(here), vocabulary.decode(there)
        text.append(said_here, style="bold green")
        if said_here != stood_there:
            text.append(f"[{stood_there}]", style="yellow")
        start = blank + 1
    text.append(vocabulary.decode(inputs[start:-1]) + "\n")
    return text
