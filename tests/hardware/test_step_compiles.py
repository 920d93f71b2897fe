"""`launch/compile.py` for TPUs that are not here: small forms of each architecture."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PLATFORM = "tpu"
SMALL = (
    "--gin.ModelConfig.num_layers=2",
    "--gin.ModelConfig.d_model=256",
    "--gin.ModelConfig.d_ff=512",
    "--gin.ModelConfig.num_heads=4",
    "--gin.ModelConfig.head_dim=64",
    "--gin.ModelConfig.dtype='bfloat16'",
    "--gin.ModelConfig.scan_layers=True",
    "--gin.train.vocabulary=@SizedVocabulary()",
    "--gin.SizedVocabulary.tokens=924",
    "--gin.train.optimizer=@AdamW()",
    "--gin.train.targets_length=None",
    "--gin.train.length=512",
    "--gin.train.batch_size=64",
)
# Bytes of the activations of all rows, in bfloat16.
ACTIVATION = 64 * 512 * 256 * 2
PAGES = {
    "span_corruption": (),
    "causal_lm": ("--gin.ModelConfig.position='rope'", "--gin.ModelConfig.num_kv_heads=2"),
}


def compile_page(tmp_path, objective: str, sharding: str, topology: str, *more: str):
    """(exit status, the record, what was printed on standard error)."""
    pages = ("runs/t5_1_1_base_c4", "models/t5_1_1_small", f"objectives/{objective}")
    done = subprocess.run(
        [
            sys.executable, "launch/compile.py",
            *(f"--gin_file=gin_configs/{page}.gin" for page in (*pages, f"sharding/{sharding}")),
            *SMALL, *PAGES[objective], *more, f"--topology={topology}", f"--workdir={tmp_path}",
        ],
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    saved = tmp_path / "compile.json"
    assert saved.exists(), done.stderr[-2000:]
    return done.returncode, json.loads(saved.read_text()), done.stderr


@pytest.mark.parametrize(
    ("objective", "sharding", "topology", "over_the_floor"),
    [
        # A table is gathered, and its gradient summed, once for each place that it is used in,
        # whole where a scatter would do.
        ("span_corruption", "data", "v5e:2x2", 1.5),
        ("causal_lm", "fsdp", "v6e:2x2", 1.7),
    ],
)
def test_small_forms(tmp_path, objective, sharding, topology, over_the_floor):
    more = ("--generate", "--max_new_tokens=8") if objective == "causal_lm" else ("--nogenerate",)
    status, record, _ = compile_page(tmp_path, objective, sharding, topology, *more)
    train = record["programs"][0]
    assert status == 0 and train["fits"] and train["memory"]["peak"] < record["hbm"]
    # Kernels compute logits again in the backward pass, and blocks are whole on the diagonal.
    # Logits of masked positions are computed again too.
    flops, again = train["flops"], train["flops"]["stages"].get("recomputed", 0.0)
    assert not flops["opaque_kernels"]
    model, most = flops["model"], flops["model"] * 1.03 + flops["kernels"] + again
    assert model * 0.97 <= flops["compiled"] <= most
    assert all(loop["known"] for loop in train["loops"].values())
    assert 0 < train["roofline"]["best"] <= train["roofline"]["worst"]
    assert train["wire"] <= over_the_floor * train["floor"]["total"]
    # Never are activations gathered whole over the batch's axes, in whatever shape: nothing is as
    # large, for all parameters together are smaller.
    assert record["parameters"] * 4 < ACTIVATION
    for collective in train["collectives"]:
        assert collective["axes"], collective
        assert collective["payload"] < ACTIVATION, collective


def test_what_does_not_fit_is_explained(tmp_path):
    status, record, errors = compile_page(
        tmp_path, "causal_lm", "data", "v5e:2x2", "--nogenerate", "--tries=1",
        "--gin.ModelConfig.num_layers=24", "--gin.ModelConfig.d_model=2048",
        "--gin.ModelConfig.d_ff=8192", "--gin.train.batch_size=16",
    )  # fmt: skip
    assert status == 1 and not record["programs"][0]["fits"]
    advice = record["advice"]
    assert advice["needed"] > advice["available"]
    assert any(tensor["name"].startswith("opt_state") for tensor in advice["state"])
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "v5e" in line and "(compiled)" in line
    assert advice["tried"][0]["fits"]
