"""Noise masks over a sequence, and what T5 makes of them (Raffel et al. 2020, section 3.1.4).

Names follow t5.data.preprocessors; `noise` is what the model must produce. Counts are rounded
with Python's float64 `round` everywhere, so that the lengths planned by
`random_spans_lengths` and the masks drawn later agree: T5 plans in float64 and masks in float32,
which differ for some lengths (190, 350, 390, ...) and then overflow the targets by one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Noise spans of a sequence, in order, none empty, no two adjacent.

    Attributes:
      starts, ends: int64 [S]; span i is the half-open range starts[i]:ends[i].
    """

    starts: np.ndarray
    ends: np.ndarray


# --- how many, and how long ------------------------------------------------------------------


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and noise spans in `length` tokens: deterministic, only their places vary.

    At least one token is noise and one is not. Spans are capped by the tokens that are not noise,
    which T5 does not do: its segmentation breaks for short spans at high density (Hugging Face's
    transformers#22246).
    """
    if length < 2 or density == 0.0:
        return 0, 0
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def longest_raw(fits: Callable[[int], bool], at_least: int) -> int:
    """The greatest raw length that fits, counting up from `at_least`; `fits` is monotone."""
    raw = at_least
    while fits(raw + 1):
        raw += 1
    return raw


def random_spans_lengths(
    inputs_length: int,
    density: float,
    mean_span: float,
    extra_tokens_per_span_inputs: int = 1,
    extra_tokens_per_span_targets: int = 1,
) -> tuple[int, int]:
    """T5's random_spans_helper: the raw length that fills `inputs_length`, and its targets.

    Both sides count one sentinel a span and one EOS. At density 0.5 the targets may exceed the
    inputs by one; then one raw token is given up, so that equal rows hold both. T5 plans with no
    span where it masks one (64-token spans in 128 tokens): here they are counted alike.

    Returns:
      (raw tokens, tokens of targets).
    """

    def sizes(raw: int) -> tuple[int, int]:
        noise, spans = noise_counts(raw, density, mean_span)
        inputs = raw - noise + spans * extra_tokens_per_span_inputs + 1
        return inputs, noise + spans * extra_tokens_per_span_targets + 1

    raw = longest_raw(lambda n: sizes(n)[0] <= inputs_length, max(inputs_length - 1, 0))
    inputs, targets = sizes(raw)
    if density == 0.5 and targets > inputs:
        raw, targets = raw - 1, targets - 1
    return raw, targets


# --- masks -----------------------------------------------------------------------------------


def _cuts(keys: np.ndarray, segments: int) -> np.ndarray:
    """The places of the `segments - 1` smallest of iid keys: a uniform set of cuts, sorted."""
    if segments == 1:
        return np.empty(0, np.int64)
    cuts = keys.argpartition(segments - 2)[: segments - 1] + 1
    cuts.sort()
    return cuts


def random_spans(length: int, density: float, mean_span: float, rng: np.random.Generator) -> Spans:
    """Spans that alternate with what is kept, which comes first; the last token is noise."""
    noise, spans = noise_counts(length, density, mean_span)
    if spans == 0:
        return Spans(np.empty(0, np.int64), np.empty(0, np.int64))
    kept = length - noise
    keys = rng.random(length - 2)
    # Cumulative sizes: noise[i] tokens of noise precede span i, kept[i] tokens are kept before it.
    noise_edges = np.empty(spans + 1, np.int64)
    noise_edges[0], noise_edges[spans] = 0, noise
    noise_edges[1:spans] = _cuts(keys[: noise - 1], spans)
    kept_before = np.empty(spans, np.int64)
    kept_before[-1] = kept
    kept_before[:-1] = _cuts(keys[noise - 1 :], spans)
    return Spans(kept_before + noise_edges[:-1], kept_before + noise_edges[1:])


def mask_of(spans: Spans, length: int) -> np.ndarray:
    """bool [length], true within the spans."""
    steps = np.zeros(length + 1, np.int8)
    steps[spans.starts] = 1
    steps[spans.ends] = -1
    return steps[:-1].cumsum(dtype=np.int8).view(bool)


def spans_of(mask: np.ndarray) -> Spans:
    """The runs of a noise mask, bool [L]."""
    padded = np.zeros(len(mask) + 2, bool)
    padded[1:-1] = mask
    edges = (padded[1:] != padded[:-1]).nonzero()[0]
    return Spans(edges[::2], edges[1::2])


def random_spans_noise_mask(
    length: int,
    density: float,
    mean_span: float,
    rng: np.random.Generator,
    random_roll: bool = False,
) -> np.ndarray:
    """bool [length]: noise of exactly `noise_counts` tokens and spans.

    Args:
      random_roll: rotate the mask by a uniform offset, so that every position is as likely to
        be noise; a span that the rotation cuts in two counts twice.
    """
    mask = mask_of(random_spans(length, density, mean_span, rng), length)
    if not random_roll or length == 0:
        return mask
    head = rng.integers(length)  # np.roll costs as much as all the rest
    return np.concatenate((mask[head:], mask[:head]))


def iid_noise_mask(length: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """bool [length]: each token is noise with probability `density`."""
    return rng.random(length) < density


def prefix_range(length: int, density: float) -> tuple[int, int]:
    """Least and most tokens of a prefix of `length` tokens, of T5's random_prefix_noise_mask.

    [max(1, round((1 - 2 density) (length - 1))), length - 1]: a uniform draw leaves a suffix of
    about `density` of the tokens. T5 ends at density 0.5; beyond it the mean is kept by lowering
    the most, to round((2 - 2 density) (length - 1)). (0, 0) for fewer than two tokens.
    """
    longest = length - 1
    if longest < 1:
        return 0, 0

    def within(share: float) -> int:
        return min(longest, max(1, round(share * longest)))

    return within(1 - 2 * density), within(2 - 2 * density)


def random_prefix_length(length: int, density: float, rng: np.random.Generator) -> int:
    """How many of `length` tokens are the prefix: uniform over `prefix_range`."""
    least, most = prefix_range(length, density)
    if most == 0:
        return 0
    return int(rng.integers(least, most, endpoint=True))


# --- what becomes of the tokens --------------------------------------------------------------

# T5's functions, under their names, are the reference that `split_at_spans` is tested against; the
# objectives, and through them seqio_adapter.py, use that one.


def drop_noise_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What is kept of tokens [L]."""
    return tokens[~mask]


def drop_nonnoise_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What is noise in tokens [L]."""
    return tokens[mask]


def noise_token_to_sentinel(tokens: np.ndarray, mask: np.ndarray, sentinel: int) -> np.ndarray:
    """Every noise token becomes the one sentinel; the length stays."""
    return np.where(mask, np.asarray(sentinel, tokens.dtype), tokens)


def noise_span_to_sentinel(tokens: np.ndarray, mask: np.ndarray, sentinel: int) -> np.ndarray:
    """Every noise span becomes the one sentinel."""
    starts = spans_of(mask).starts
    return _replace(tokens, mask, starts, sentinel)


def nonnoise_span_to_sentinel(tokens: np.ndarray, mask: np.ndarray, sentinel: int) -> np.ndarray:
    """Every span between noise becomes the one sentinel."""
    return noise_span_to_sentinel(tokens, ~mask, sentinel)


def noise_span_to_unique_sentinel(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray
) -> np.ndarray:
    """Noise span i becomes sentinels[i]; raises IndexError if there are more spans than those."""
    starts = spans_of(mask).starts
    return _replace(tokens, mask, starts, _first(sentinels, len(starts)))


def nonnoise_span_to_unique_sentinel(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray
) -> np.ndarray:
    """T5's targets where the mask starts with a kept token: kept span i becomes sentinels[i]."""
    return noise_span_to_unique_sentinel(tokens, ~mask, sentinels)


def _replace(tokens, mask, starts, sentinels) -> np.ndarray:
    keep = ~mask
    keep[starts] = True
    replaced = tokens.copy()
    replaced[starts] = sentinels
    return replaced[keep]


def _first(sentinels: np.ndarray, count: int) -> np.ndarray:
    """The first `count` sentinels; ids never run on into the ordinary vocabulary, as T5's do."""
    if count > len(sentinels):
        raise IndexError(f"{count} noise spans need as many sentinels; there are {len(sentinels)}")
    return sentinels[:count]


class Split(NamedTuple):
    """Where the tokens of span corruption's two sides come from; sentinels are marked.

    A sentinel comes from the first token of its noise span, which gives it that token's document.

    Attributes:
      inputs, targets: int64 [I] and [T], indices into the tokens.
      input_sentinels, target_sentinels: int64 [S], slots that hold a sentinel instead.
    """

    inputs: np.ndarray
    targets: np.ndarray
    input_sentinels: np.ndarray
    target_sentinels: np.ndarray


def split_at_spans(spans: Spans, length: int) -> Split:
    """Inputs keep what is not noise, targets list the noise, both with a sentinel for each span.

    Both sides number the *noise* spans. T5 numbers the kept spans on the targets' side, which is
    the same only while the mask starts with a kept token: once rolled, its sentinels no longer
    say which span they stand for.
    """
    starts, ends = spans
    mask = mask_of(spans, length)
    noise = mask.nonzero()[0]
    order = np.arange(len(starts))
    ends_in_noise = (ends - starts).cumsum()
    starts_in_noise = ends_in_noise - (ends - starts)

    mask[starts] = False
    inputs = (~mask).nonzero()[0]
    target_sentinels = starts_in_noise + order
    is_token = np.ones(len(noise) + len(starts), bool)
    is_token[target_sentinels] = False
    targets = np.empty(len(is_token), np.int64)
    targets[is_token] = noise
    targets[target_sentinels] = starts
    return Split(inputs, targets, starts - starts_in_noise + order, target_sentinels)
