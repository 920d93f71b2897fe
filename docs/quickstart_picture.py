"""Draws docs/quickstart.png of a finished run: `python docs/quickstart_picture.py WORKDIR`."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Loss against tokens on the left; on the right what the held-out loss is worth."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "validation"]
    quality = json.loads((workdir / "quality.json").read_text())

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), width_ratios=[3, 2], layout="constrained"
    )
    millions = train[-1]["tokens"] / train[-1]["step"] / 1e6
    for split, style, label in ((train, "-", "train"), (held_out, "o", "held-out files")):
        x, y = [line["step"] * millions for line in split], [line["loss"] for line in split]
        left.plot(x, y, style, lw=1, ms=4, label=label)
    left.set(xlabel="million tokens", ylabel="loss, nats a target token", title="Training")
    left.legend(frameon=False)

    bars = {
        "the model": quality["loss"],
        "given another\nexample's input": quality["wrong_input_loss"],
        "unigram\nentropy": quality["unigram_entropy"],
    }
    drawn = right.barh(list(bars), list(bars.values()), color=["C0", "C1", "0.7"])
    right.bar_label(drawn, fmt="%.2f", padding=3)
    right.invert_yaxis()
    right.set(xlim=(0, 1.2 * max(bars.values())), title="Held-out files, nats a content token")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]), pathlib.Path(__file__).parent / "quickstart.png")
