"""Who sees whom, shown by changing one token and looking at what moves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

FAMILIES = ["t5", "llama", "bert", "per layer", "sinusoidal"]


def moved(tiny, config, batch, feature, row, slot) -> np.ndarray:
    """bool [B, L]: which logits change when one token of one feature does."""
    changed = {**batch, feature: batch[feature].copy()}
    changed[feature][row, slot] = (changed[feature][row, slot] + 7) % config.vocab_size
    difference = np.abs(tiny.logits(config, batch) - tiny.logits(config, changed)).max(-1)
    assert ((difference == 0) | (difference > 1e-6)).all(), "neither equal nor clearly moved"
    return difference > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_causality(tiny, family, architecture):
    """Changing token t moves every later logit of its row, its own, and nothing before t."""
    config, batch = tiny.config(architecture, family), tiny.batch(architecture)
    length = batch["decoder_input_tokens"].shape[1]
    for slot in (0, 3, length - 1):
        expected = np.zeros((2, length), bool)
        expected[1, slot:] = True
        np.testing.assert_array_equal(
            moved(tiny, config, batch, "decoder_input_tokens", 1, slot), expected
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_sees_both_ways(tiny, family):
    config, batch = tiny.config("encoder", family), tiny.batch("encoder")
    changes = moved(tiny, config, batch, "encoder_input_tokens", 0, 4)
    assert changes[0].all() and not changes[1].any()


def test_every_target_sees_every_input(tiny):
    config, batch = tiny.config("encoder_decoder"), tiny.batch("encoder_decoder")
    changes = moved(tiny, config, batch, "encoder_input_tokens", 0, tiny.length - 1)
    assert changes[0].all() and not changes[1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix(tiny, family):
    """Prefix slots see each other both ways; what follows them stays causal."""
    config, batch = tiny.config("decoder", family), tiny.batch("decoder")
    flags = np.zeros_like(batch["decoder_input_tokens"])
    flags[0, :4] = 1
    batch["decoder_causal_attention"] = flags
    inside = moved(tiny, config, batch, "decoder_input_tokens", 0, 3)
    assert inside[0].all()
    after = moved(tiny, config, batch, "decoder_input_tokens", 0, 6)
    assert not after[0, :6].any() and after[0, 6:].all()
    plain_row = moved(tiny, config, batch, "decoder_input_tokens", 1, 3)
    assert not plain_row[1, :3].any() and plain_row[1, 3:].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_prefix_decoder_is_an_encoder(tiny, family):
    """With every flag set a decoder computes exactly what the encoder of its weights would."""
    encoder = tiny.config("encoder", family)
    decoder = dataclasses.replace(encoder, architecture="decoder", relative_bidirectional=True)
    params = tiny.parameters(decoder)
    renamed = {("encoder" if name == "decoder" else name): tree for name, tree in params.items()}
    batch = tiny.batch("decoder")
    as_encoder = {name.replace("decoder", "encoder"): value for name, value in batch.items()}
    batch["decoder_causal_attention"] = np.ones_like(batch["decoder_input_tokens"])
    np.testing.assert_allclose(
        tiny.logits(decoder, batch, params), tiny.logits(encoder, as_encoder, renamed), atol=1e-6
    )


def pack(tiny, architecture: str) -> tuple[dict, dict]:
    """(a row of two examples and padding, twice over; the same examples one a row)."""
    single = tiny.batch(architecture)
    lengths = {"encoder": (4, 5), "decoder": (3, 4)}
    packed = {}
    for stack, (first, second) in lengths.items():
        if f"{stack}_input_tokens" not in single:
            continue
        tokens = single[f"{stack}_input_tokens"]
        ids, row = np.zeros_like(tokens), np.full((1, tokens.shape[1]), 9, np.int32)
        positions = np.zeros_like(row)
        row[0, :first], row[0, first : first + second] = tokens[0, :first], tokens[1, :second]
        positions[0, :first], positions[0, first : first + second] = range(first), range(second)
        packed[f"{stack}_input_tokens"], packed[f"{stack}_positions"] = row, positions
        packed[f"{stack}_segment_ids"] = np.zeros_like(row)
        packed[f"{stack}_segment_ids"][0, : first + second] = [1] * first + [2] * second
        ids[0, :first], ids[1, :second] = 1, 1
        single[f"{stack}_segment_ids"] = ids
    return {name: row.repeat(2, 0) for name, row in packed.items()}, single


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_packing_isolation(tiny, family, architecture):
    """Two examples packed in one row get the logits that each gets alone."""
    config = tiny.config(architecture, family)
    packed, single = pack(tiny, architecture)
    first, second = (4, 5) if architecture == "encoder" else (3, 4)
    together, alone = tiny.logits(config, packed), tiny.logits(config, single)
    np.testing.assert_allclose(together[0, :first], alone[0, :first], atol=2e-5)
    np.testing.assert_allclose(together[0, first : first + second], alone[1, :second], atol=2e-5)


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_packed_neighbours_move_nothing(tiny, architecture):
    config = tiny.config(architecture)
    packed, _ = pack(tiny, architecture)
    for stack, (first, second) in {"encoder": (4, 5), "decoder": (3, 4)}.items():
        feature = f"{stack}_input_tokens"
        if feature not in packed:
            continue
        predicts = (4, 5) if architecture == "encoder" else (3, 4)
        real = slice(0, sum(predicts))
        of_first = moved(tiny, config, packed, feature, 0, 1)[0, real]
        assert of_first[: predicts[0]].any() and not of_first[predicts[0] :].any()
        of_second = moved(tiny, config, packed, feature, 0, first)[0, real]
        assert of_second[predicts[0] :].any() and not of_second[: predicts[0]].any()
        of_padding = moved(tiny, config, packed, feature, 0, first + second)[0, real]
        assert not of_padding.any()


def test_relative_bias_from_positions_equals_slots_where_contiguous(tiny):
    packed, _ = pack(tiny, "encoder")
    slots, positions = (
        tiny.config("encoder", relative_from=choice) for choice in ("slots", "positions")
    )
    np.testing.assert_allclose(
        tiny.logits(slots, packed)[0, :9], tiny.logits(positions, packed)[0, :9], atol=1e-6
    )
    packed["encoder_positions"] = packed["encoder_positions"] * 2
    different = np.abs(tiny.logits(slots, packed) - tiny.logits(positions, packed))[0, :9]
    assert different.max() > 1e-3


def test_absent_features_mean_one_unpadded_example_a_row(tiny):
    for architecture in ("encoder", "decoder", "encoder_decoder"):
        config, batch = tiny.config(architecture), tiny.batch(architecture)
        bare = {name: value for name, value in batch.items() if name.endswith("tokens")}
        np.testing.assert_allclose(tiny.logits(config, bare), tiny.logits(config, batch), atol=1e-6)


def test_token_types_are_read(tiny):
    config, batch = tiny.config("encoder", "bert"), tiny.batch("encoder")
    zeros = np.zeros_like(batch["encoder_input_tokens"])
    default = tiny.logits(config, batch)
    np.testing.assert_array_equal(
        default, tiny.logits(config, {**batch, "encoder_token_types": zeros})
    )
    ones = tiny.logits(config, {**batch, "encoder_token_types": zeros + 1})
    assert np.abs(default - ones).max() > 1e-3


def test_ids_out_of_range_read_the_nearest_row(tiny):
    config, batch = tiny.config("encoder"), tiny.batch("encoder")
    batch["encoder_input_tokens"][0, :2] = 0, config.vocab_size - 1
    expected = tiny.logits(config, batch)
    batch["encoder_input_tokens"][0, :2] = -5, config.vocab_size + 3
    np.testing.assert_array_equal(tiny.logits(config, batch), expected)
