import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.examples import Aligned, Seq2Seq
from t5like.data.layout import FEATURES, LayoutError, lay_out, spec


def ints(*values):
    return np.array(values, np.int32)


NONE = ints()


def test_reproduces_seqios_feature_converters(shared_data):
    peer = json.loads((shared_data / "peer" / "peer_expectations.json").read_text())
    cases = peer["feature_converters"]["cases"]
    assert len(cases) == 9
    for case in cases:
        arguments = case["converter"]["args"]
        lengths = case["task_feature_lengths"]
        examples = [
            Seq2Seq(ints(*e.get("inputs", ())), ints(*e["targets"])) for e in case["examples"]
        ]
        expected = case["expected"]
        # seqio's packed cases of long sequences expect one row an example.
        rows = [[e] for e in examples] if isinstance(expected, list) else [examples]
        expected = expected if isinstance(expected, list) else [expected]
        both = case["converter"]["name"] == "EncDecFeatureConverter"
        batch = lay_out(
            rows,
            architecture="encoder_decoder" if both else "decoder",
            length=lengths["inputs"] if both else lengths["targets"],
            targets_length=lengths["targets"] if both else None,
            bos_id=arguments.get("bos_id", 0),
            pad_id=0,
            sees_ahead=True,
        )
        for r, features in enumerate(expected):
            for name, values in features.items():
                actual = batch[name][r]
                if name == "decoder_input_tokens" and not arguments["pack"]:
                    # Unpacked, seqio repeats the last target at the first padding slot.
                    real = batch["decoder_loss_weights"][r] > 0
                    actual, values = actual[real], np.array(values)[real]
                np.testing.assert_array_equal(actual, values, f"{case['test']}: {name}")


def decoder(*examples, length=12, bos=9, across=True, sees_ahead=True):
    batch = lay_out(
        [list(examples)],
        architecture="decoder",
        length=length,
        bos_id=bos,
        pad_id=0,
        attend_across_documents=across,
        sees_ahead=sees_ahead,
    )
    return {name.removeprefix("decoder_"): array[0].tolist() for name, array in batch.items()}


@pytest.mark.parametrize(
    "targets, split, weights, flags",
    [  # t5.data.preprocessors_test, test_pack_prefix_lm_decoder_only
        ([9, 1, 2, 3, 4, 5, 6, 7], 3, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]),
        ([8, 9, 10, 11, 12, 13, 14, 15], 5, [0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]),
        ([8, 9, 10, 11, 12, 13, 0, 0], 3, [0, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_prefix_in_a_decoder_is_t5s(targets, split, weights, flags):
    real = ints(*[t for t in targets if t])
    row = decoder(Seq2Seq(real[:split], real[split:]), length=8, bos=0)
    assert row["target_tokens"] == targets
    assert row["loss_weights"] == weights
    assert row["causal_attention"] == flags
    real_slots = len(real)
    assert row["input_tokens"][:real_slots] == ([0] + targets)[:real_slots]


def test_prefixes_packed_behind_each_other():
    row = decoder(Seq2Seq(ints(11, 12), ints(13, 14)), Seq2Seq(ints(21), ints(22, 23)), length=9)
    assert row == {
        "input_tokens": [9, 11, 12, 13, 9, 21, 22, 9, 0],
        "target_tokens": [11, 12, 13, 14, 21, 22, 23, 0, 0],
        "loss_weights": [0, 0, 1, 1, 0, 1, 1, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 0, 0],
        "causal_attention": [1, 1, 1, 0, 1, 1, 0, 0, 0],
    }


def test_without_a_bidirectional_prefix_all_is_causal():
    example = Seq2Seq(ints(1, 2), ints(3), bidirectional_inputs=False, loss_on_inputs=True)
    row = decoder(example, Seq2Seq(NONE, ints(4, 5)), length=6)
    assert row["causal_attention"] == [0] * 6
    assert row["loss_weights"] == [1, 1, 1, 1, 1, 0]
    without = decoder(example, Seq2Seq(NONE, ints(4, 5)), length=6, sees_ahead=False)
    assert without == {k: v for k, v in row.items() if k != "causal_attention"}


@pytest.mark.parametrize(
    "example", [Seq2Seq(ints(1), ints(2)), Aligned(ints(1), ints(2), np.ones(1, np.float32))]
)
def test_who_sees_ahead_unannounced_is_refused(example):
    with pytest.raises(LayoutError, match="example 1 of row 0: .* `sees_ahead` is False"):
        decoder(Seq2Seq(NONE, ints(4)), example, sees_ahead=False)


def test_documents_that_must_not_see_each_other():
    example = Seq2Seq(ints(1, 2, 3), ints(4, 5), ints(0, 0, 1), ints(1, 2))
    row = decoder(example, Seq2Seq(NONE, ints(6)), length=7, across=False)
    assert row["segment_ids"] == [1, 1, 2, 2, 3, 4, 0]
    assert row["input_tokens"] == [9, 1, 9, 3, 9, 9, 9]
    assert row["positions"] == [0, 1, 2, 3, 4, 0, 0]
    assert decoder(example, length=5)["segment_ids"] == [1] * 5


def test_documents_have_one_segment_id_on_both_sides():
    first = Seq2Seq(ints(1, 2, 3), ints(4, 5), ints(0, 1, 2), ints(0, 2))
    second = Seq2Seq(ints(6), ints(7))
    batch = lay_out(
        [[first, second]],
        architecture="encoder_decoder",
        length=5,
        targets_length=4,
        bos_id=9,
        pad_id=0,
        attend_across_documents=False,
    )
    assert batch["encoder_segment_ids"].tolist() == [[1, 2, 3, 4, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 3, 4, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[9, 9, 9, 9]]


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_aligned_is_not_shifted(side):
    first = Aligned(ints(5, 6, 7), ints(5, 8, 7), np.array([0, 1, 0.5], np.float32))
    second = Aligned(
        ints(3, 4), ints(3, 3), np.ones(2, np.float32), ints(4, 2), documents=ints(0, 1)
    )
    batch = lay_out(
        [[first, second]],
        architecture=side,
        length=6,
        bos_id=9,
        pad_id=1,
        attend_across_documents=False,
        sees_ahead=True,
    )
    row = {name.removeprefix(f"{side}_"): array[0].tolist() for name, array in batch.items()}
    assert row["input_tokens"] == [5, 6, 7, 3, 4, 1]
    assert row["target_tokens"] == [5, 8, 7, 3, 3, 1]
    assert row["loss_weights"] == [0, 1, 0.5, 1, 1, 0]
    assert row["segment_ids"] == [1, 1, 1, 2, 3, 0]
    assert row["positions"] == [0, 1, 2, 4, 2, 0]
    if side == "decoder":
        assert row["causal_attention"] == [1, 1, 1, 1, 1, 0]


def test_a_decoder_row_takes_aligned_and_shifted_examples_together():
    aligned = Aligned(ints(5, 6), ints(7, 8), np.ones(2, np.float32))
    row = decoder(Seq2Seq(NONE, ints(1, 2)), aligned, Seq2Seq(NONE, ints(3)), length=6)
    assert row["input_tokens"] == [9, 1, 5, 6, 9, 9]
    assert row["target_tokens"] == [1, 2, 7, 8, 3, 0]
    assert row["causal_attention"] == [0, 0, 1, 1, 0, 0]


SIZES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=50)
@given(rows=st.lists(SIZES, min_size=1, max_size=3), architecture=st.sampled_from(sorted(FEATURES)))
def test_every_token_is_laid_out_once_and_pads_weigh_nothing(rows, architecture):
    token = iter(range(100, 10_000))

    def example(inputs, targets):
        first, second = (ints(*(next(token) for _ in range(n))) for n in (inputs, targets))
        if architecture == "encoder":
            return Aligned(first, first, np.ones(inputs, np.float32))
        return Seq2Seq(first, second, loss_on_inputs=True)

    rows = [[example(*sizes) for sizes in row] for row in rows]
    batch = lay_out(
        rows, architecture=architecture, length=40, targets_length=20, bos_id=7, pad_id=0,
        sees_ahead=True,
    )  # fmt: skip
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert shapes == spec(architecture, len(rows), 40, 20, sees_ahead=True)
    for r, row in enumerate(rows):
        sides = {
            "encoder": {"encoder": [e.tokens for e in row if architecture == "encoder"]},
            "decoder": {"decoder": [x for e in row for x in sides_of(e)]},
            "encoder_decoder": {
                "encoder_input": [sides_of(e)[0] for e in row],
                "decoder": [sides_of(e)[1] for e in row],
            },
        }[architecture]
        for side, parts in sides.items():
            tokens = np.concatenate(parts)
            name = f"{side}_tokens" if side.endswith("input") else f"{side}_target_tokens"
            room = batch[name].shape[1] - len(tokens)
            np.testing.assert_array_equal(batch[name][r], np.pad(tokens, (0, room)))
            segments = batch[f"{side.removesuffix('_input')}_segment_ids"][r]
            assert (segments > 0).tolist() == [True] * len(tokens) + [False] * room
            if not side.endswith("input"):
                np.testing.assert_array_equal(batch[f"{side}_loss_weights"][r], segments > 0)


def sides_of(example):
    return (example.inputs, example.targets) if isinstance(example, Seq2Seq) else (NONE, NONE)


@pytest.mark.parametrize(
    "architecture, example, reason",
    [
        ("decoder", Seq2Seq(ints(1, 2), ints(3, 4)), "4 inputs and targets do not fit the 3 slots"),
        ("encoder_decoder", Seq2Seq(ints(1, 2, 3, 4), ints(3)), "4 inputs do not fit"),
        ("encoder_decoder", Seq2Seq(ints(1), ints(3, 4, 5)), "3 targets do not fit the 2"),
        ("encoder_decoder", Aligned(ints(1), ints(1), np.ones(1)), "Seq2Seq examples only"),
        ("encoder", Seq2Seq(ints(1), ints(3)), "Aligned examples only"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(architecture, example, reason):
    fits = {
        "encoder": Aligned(ints(1), ints(1), np.ones(1)),
        "decoder": Seq2Seq(NONE, ints(1)),
        "encoder_decoder": Seq2Seq(ints(1), ints(1)),
    }[architecture]
    with pytest.raises(LayoutError, match=reason) as error:
        lay_out(
            [[fits], [fits, example]],
            architecture=architecture,
            length=4,
            targets_length=3,
            bos_id=0,
            pad_id=0,
        )
    assert (error.value.row, error.value.example) == (1, 1)
