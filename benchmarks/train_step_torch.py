"""PyTorch's step for benchmarks/train_step.py: transformers' models from our weights, AdamW.

Imports PyTorch and transformers, which requirements/peers.txt pins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.peer_models import peer_model
from benchmarks.train_step_cases import OPTIMIZER, Case

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a peer runs.

    Attributes:
      attention: transformers' "eager" or "sdpa".
      compiled: whether torch.compile made the loss and its gradient.
      fused: whether AdamW is PyTorch's fused kernel; else it loops over tensors.
    """

    attention: str
    compiled: bool
    fused: bool

    def __str__(self) -> str:
        kind = "compiled" if self.compiled else "eager"
        attention = "SDPA" if self.attention == "sdpa" else "plain attention"
        return f"{kind}, {attention}, {'fused' if self.fused else 'unfused'} AdamW"


SETTINGS = (
    Setting("eager", compiled=False, fused=False),
    Setting("eager", compiled=False, fused=True),
    Setting("sdpa", compiled=False, fused=True),
    Setting("eager", compiled=True, fused=True),
    Setting("sdpa", compiled=True, fused=True),
)


class Peer:
    """A peer with our weights, ready to step."""

    def __init__(self, case: Case, params: Mapping[str, Any], setting: Setting):
        self.setting = setting
        self.model = peer_model(case, params, setting.attention).train()
        matrices, vectors = [], []
        for name, parameter in self.model.named_parameters():
            decays = parameter.ndim > 1 and "bias" not in name
            (matrices if decays else vectors).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER.learning_rate.peak,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=setting.fused,
        )
        self._loss: Callable = LOSSES[case.name]
        if setting.compiled:
            self._loss = torch.compile(self._loss)

    def step(self, batch: Tensors, temperature: float = 1.0) -> torch.Tensor:
        """One update; returns the loss before it.

        Args:
          batch: as `tensors` makes it.
          temperature: of ELECTRA's samples.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.model, batch, temperature)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def tensors(batch: Mapping[str, np.ndarray]) -> Tensors:
    """Our batch as transformers wants it: "labels" are -100 where there is no loss, and "chosen"
    are the places of the flattened batch where there is."""
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    weights, targets = batch[f"{stack}_loss_weights"], batch[f"{stack}_target_tokens"]
    more = {"labels": np.where(weights > 0, targets, -100), "chosen": weights.ravel().nonzero()[0]}
    found = {name: x for name, x in batch.items() if name.endswith("tokens")} | more
    return {name: torch.from_numpy(x.astype(np.int64)) for name, x in found.items()}


def _t5_loss(model, batch: Tensors, temperature: float) -> torch.Tensor:
    inputs, decoder = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    labels = batch["labels"]
    return model(inputs, decoder_input_ids=decoder, labels=labels, use_cache=False).loss


def _bert_loss(model, batch: Tensors, temperature: float) -> torch.Tensor:
    return model(batch["encoder_input_tokens"], labels=batch["labels"]).loss


def _electra_loss(model, batch: Tensors, temperature: float) -> torch.Tensor:
    names = "encoder_input_tokens", "encoder_target_tokens", "labels", "chosen"
    return model(*(batch[name] for name in names), temperature)


def _llama_loss(model, batch: Tensors, temperature: float) -> torch.Tensor:
    inputs, labels = batch["decoder_input_tokens"], batch["labels"]
    return model(inputs, labels=labels, shift_labels=labels, use_cache=False).loss


LOSSES = {"T5": _t5_loss, "BERT": _bert_loss, "ELECTRA": _electra_loss, "Llama": _llama_loss}
