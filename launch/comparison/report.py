"""What a comparison found: comparison.json, a markdown table and a plot of quality over compute.

The results of the runs are {run: {seed: result}}, a result being what runs.py writes:
{"steps", "tokens", "flops", "compiled_flops", "seconds", "points": [{"step", "flops",
"measures": {"measure/metric": value}}]}, the last point being the run's end.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from launch.comparison.config import CompareConfig
from launch.comparison.statistics import Summary, summarise
from launch.files import write_whole

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def write(config: CompareConfig, results: Results, workdir: epath.Path) -> str:
    """Writes comparison.json, comparison.md and comparison.png; returns the markdown."""
    summaries = summaries_of(config, results)
    table = markdown(config, results, summaries)
    content = {
        "budget": dict([config.budget(config.reference)]),
        "baseline": config.reference,
        "expected": config.expected,
        "runs": {name: {str(s): r for s, r in seeds.items()} for name, seeds in results.items()},
        "summary": {
            name: {metric: _json(summary) for metric, summary in metrics.items()}
            for name, metrics in summaries.items()
        },
    }
    write_whole(workdir / "comparison.json", json.dumps(content, indent=1) + "\n")
    write_whole(workdir / "comparison.md", table)
    write_whole(workdir / "comparison.png", plot(config, results))
    return table


def _json(summary: Summary) -> dict[str, float | None]:
    """The summary with null for what its seeds cannot tell."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(summary).items()
    }


def final(result: Mapping[str, Any]) -> Mapping[str, float]:
    """{"measure/metric": value} at a run's end."""
    return result["points"][-1]["measures"]


def summaries_of(config: CompareConfig, results: Results) -> dict[str, dict[str, Summary]]:
    """Run -> metric -> Summary beside the baseline; a run lacks the metrics it cannot give."""
    found: dict[str, dict[str, Summary]] = {}
    reference = results.get(config.reference, {})
    for name, seeds in results.items():
        metrics = dict.fromkeys(m for result in seeds.values() for m in final(result))
        found[name] = {
            metric: summarise(_values(seeds, metric), _values(reference, metric))
            for metric in metrics
        }
    return found


def _values(seeds: Mapping[int, Mapping[str, Any]], metric: str) -> dict[int, float]:
    return {s: final(r)[metric] for s, r in seeds.items() if metric in final(r)}


# --- the table -------------------------------------------------------------------------------


def markdown(
    config: CompareConfig, results: Results, summaries: Mapping[str, Mapping[str, Summary]]
) -> str:
    """A row for each run that is shown: cost, then each metric as mean ± spread.

    Bold marks a mean whose difference to the baseline is beyond what its seeds could show.
    """
    shown = [name for name in results if name not in config.hidden]
    metrics = list(dict.fromkeys(m for name in shown for m in summaries[name]))
    titles = [_title(config, metric) for metric in metrics]
    head = ["run", "steps", "FLOPs (compiled / formula)", "seconds", *titles]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for name in shown:
        runs = list(results[name].values())
        cost = [name, f"{runs[0]['steps']:,}", _flops(runs[0]), f"{_mean(runs, 'seconds'):.0f}"]
        cells = (_cell(summaries[name].get(m), name == config.reference) for m in metrics)
        lines.append(_line([*cost, *cells]))
    smallest = [
        max((summaries[n][m].smallest_effect for n in shown if m in summaries[n]), default=math.nan)
        for m in metrics
    ]
    effects = ", ".join(
        f"{title} {_number(e)}" for title, e in zip(titles, smallest, strict=True) if e == e
    )
    return "\n".join([*lines, "", *_notes(config, effects)]) + "\n"


def _notes(config: CompareConfig, effects: str) -> list[str]:
    """What a reader needs to know of the table, a paragraph each."""
    notes = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, config.seeds))}. Seconds are "
        "those of the updates. Compiled FLOPs are XLA's count, with the optimiser's and with both "
        "branches of conditionals, of which one runs."
    ]
    if effects:
        notes += [
            "",
            f"Bold: the 95% interval of the paired difference to {config.reference} excludes 0, as "
            "one cell in twenty does by chance. The effect that all rows would have shown in four "
            f"cases of five: {effects}. The test set's own error, which all seeds share, is not in "
            "it.",
        ]
    return notes + ([f"\nExpected beforehand: {config.expected}"] if config.expected else [])


def _mean(runs: list[Mapping[str, Any]], field: str) -> float:
    return sum(run[field] for run in runs) / len(runs)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(config: CompareConfig, metric: str) -> str:
    """A metric's name and which way is better."""
    measure, _, name = metric.partition("/")
    better = getattr(config.measures[measure], "higher_is_better", {}).get(name)
    arrow = {True: " ↑", False: " ↓", None: ""}[better]
    return metric.replace("/", " ").replace("_", " ") + arrow


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _cell(summary: Summary | None, is_baseline: bool) -> str:
    if summary is None:
        return ""
    text = _number(summary.mean)
    if not math.isnan(summary.spread):
        text += f" ± {_number(summary.spread)}"
    return f"**{text}**" if summary.shows and not is_baseline else text


def _flops(result: Mapping[str, Any]) -> str:
    compiled = result.get("compiled_flops")
    ratio = f" ({compiled / result['flops']:.2f})" if compiled else ""
    return f"{result['flops']:.2e}{ratio}"


# --- the plot --------------------------------------------------------------------------------


def plot(config: CompareConfig, results: Results) -> bytes:
    """A PNG: one panel a metric of `curve` (of all where there is none), quality over FLOPs."""
    import io

    from matplotlib.figure import Figure

    shown = [name for name in results if name not in config.hidden]
    metrics = _plotted(config, results, shown)
    columns = min(3, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, metric in zip(axes, metrics, strict=False):
        for number, name in enumerate(shown):
            _draw(axis, results[name], metric, name, number)
        axis.set(title=_title(config, metric), xlabel="model FLOPs")
        low, high = axis.get_xlim()
        if low > 0 and high > 10 * low:
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    handles = {}
    for axis in axes:
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _plotted(config: CompareConfig, results: Results, shown: list[str]) -> list[str]:
    """Metrics of the measures in `curve`; all metrics where no curve is asked for."""
    metrics = dict.fromkeys(m for n in shown for r in results[n].values() for m in final(r))
    return [m for m in metrics if not config.curve or m.partition("/")[0] in config.curve]


def _draw(axis, seeds: Mapping[int, Mapping[str, Any]], metric: str, name: str, number: int):
    """Mean over seeds as a line, the range of the seeds as a band or bar, point by point."""
    points = [
        [p for p in column if metric in p["measures"]]
        for column in zip(*(result["points"] for result in seeds.values()), strict=False)
    ]
    points = [column for column in points if column]
    if not points:
        return
    x = [sum(p["flops"] for p in column) / len(column) for column in points]
    values = [[p["measures"][metric] for p in column] for column in points]
    mean = [sum(v) / len(v) for v in values]
    low, high = [min(v) for v in values], [max(v) for v in values]
    style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
    if len(x) == 1:
        # Equal budgets lie on one another: a little aside, so that each can be seen.
        x = [x[0] * (1 + 0.03 * number)]
        error = [[mean[0] - low[0]], [high[0] - mean[0]]]
        axis.errorbar(x, mean, _clipped(error), marker="o", capsize=2, label=name, **style)
        return
    axis.plot(x, mean, marker="o", markersize=3, label=name, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _clipped(bars: list[list[float]]) -> list[list[float]]:
    """Error bars without the tiny negative lengths that rounding makes."""
    return [[max(0.0, value) for value in side] for side in bars]
