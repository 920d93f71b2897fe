"""The logic of the step's and the decoder's benchmarks, at a tiny size and without PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import generate, train_step, train_step_hardware as hardware
from benchmarks.side_by_side import Contender, attempted, race, rows
from benchmarks.train_step_cases import CASES, ours
from t5like.models.transformer import Transformer

SMALL = dict(vocab_size=64, num_layers=1, d_model=16, d_ff=32, num_heads=2, head_dim=8)


def small(name):
    case = CASES[name]
    config = dataclasses.replace(case.config, **SMALL)
    targets = None if case.targets is None else 8
    return dataclasses.replace(case, config=config, rows=2, length=16, targets=targets)


def test_losses_and_weights_are_those_before_the_updates():
    case = small("T5")
    contender, losses, params = train_step.our_contender(case)
    contender.call()
    fresh = ours(case).state.params
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(fresh))
    assert losses[1] < losses[0]
    assert contender.shown == f"{losses[0]:.5f} then {losses[1]:.5f}"
    train_step.check("a rival", (losses[0], losses[1] * 1.00001), losses)
    with pytest.raises(AssertionError, match="a rival: loss .* after 1 updates"):
        train_step.check("a rival", (losses[0], losses[1] * 1.001), losses)


def test_a_race_takes_turns_and_its_ratios_are_within_rounds():
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "abc"]
    race(contenders, rounds=2, calls=2)
    assert "".join(order) == "aabbcc" + "bbccaa"
    contenders[0].seconds, contenders[1].seconds = [1.0, 2.0, 4.0], [2.0, 2.0, 16.0]
    cells = rows("T5", 8, contenders[:2])
    assert cells[0][:4] == ["T5", "a", "4", "2 to 8"] and cells[0][5] == ""
    assert cells[1][2:4] == ["4", "0 to 4"] and cells[1][5] == "2.00 (1.00 to 4.00)"


def test_our_tokens_are_greedy():
    case = small("Llama")
    params = generate.sharp_parameters(case)
    inputs = generate.prompts(case, rows=2, length=4)
    tokens = generate.our_generate(case, params, inputs, new_tokens=3)()
    assert tokens.shape == (2, 3)
    text = np.concatenate([np.zeros((2, 1), np.int32), np.stack(inputs), tokens], axis=1)
    batch = {"decoder_input_tokens": text}
    logits = np.array(Transformer(case.config).apply({"params": params}, batch))
    logits[..., 0] = -np.inf  # padding is never written
    np.testing.assert_array_equal(logits[:, 4:-1].argmax(-1), tokens)
    with pytest.raises(AssertionError, match="a rival writes 50.0%"):
        generate.check(np.stack([tokens[0], tokens[1] + 1]), tokens, "a rival")


def test_decoding_alone_makes_its_page(monkeypatch, tmp_path):
    monkeypatch.setitem(CASES, "Llama", small("Llama"))
    sizes = ["--rows=2", "--length=4", "--new_tokens=3", "--rounds=1"]
    page = tmp_path / "page.md"
    assert generate.main(["--alone", "--cases", "Llama", *sizes, f"--out={page}"]) == 0
    assert page.read_text().splitlines()[-1].startswith("| Llama | ours | ")


def test_a_setting_that_raises_is_skipped_and_said(capsys):
    assert attempted("T5, sum", lambda: sum([1, 2])) == 3
    assert attempted("T5, division", lambda: 1 / 0) is None
    assert capsys.readouterr().out == "T5, division: ZeroDivisionError: division by zero\n"


def test_utilisation_is_model_flops_over_time(monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e9)
    case = hardware.tiny(hardware.CASES["decoder"])
    found = hardware.cells(case, [0.5, 1.0, 4.0])
    flops = case.bound.train_flops(case.config, case.batch())
    assert found[2:5] == ["1000.0", "500.0 to 4000.0", f"{case.tokens}"]
    assert found[6] == f"{flops / 1e9:.1%}"


def test_a_bfloat16_loss_is_checked():
    case = hardware.tiny(hardware.CASES["decoder"])
    config = dataclasses.replace(case.config, dtype="bfloat16")
    assert hardware.check(dataclasses.replace(case, config=config)) > 0
