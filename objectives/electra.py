"""Replaced token detection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from objectives.masking import Masking
from objectives.next_token import check_choice, check_range
from t5like.errors import UserError

Task = Literal["replaced_token_detection", "masked_positions_only", "replace_mlm", "all_tokens_mlm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Electra(Masking):
    """Tells a small generator's tokens from the text's own (Clark et al. 2020, section 3).

    max(1, round(rate * tokens)) positions are drawn, [CLS] and [SEP] counted but never drawn; the
    generator sees [MASK] at 85% of them and the token itself at the rest, and predicts them all
    (cross-entropy, over drawn positions). A sample of its distribution then stands at every drawn
    position of the text, and the main network, which is what is kept, tells for every token
    whether it was replaced (binary cross-entropy, over all tokens but padding). A sample that
    equals the text's token counts as original. The total is generator_weight * generator +
    discriminator_weight * main network; no gradient passes through the samples. Both are trained
    in one step. The generator shares the embeddings, so the main network's loss moves it through
    them alone.

    `task` has the ablations of section 3.4, which ask the same main network something else about
    the same input:

    - "masked_positions_only" (ELECTRA 15%): its loss over the drawn positions alone;
    - "replace_mlm": it predicts the text at the drawn positions;
    - "all_tokens_mlm": it predicts the text everywhere, with a learned probability of copying its
      input.

    Otherwise than the reference (google-research/electra): positions are drawn without
    replacement, because with it, as there, 128 tokens get 17.7 positions instead of 19, and where
    two samples fall on one position their ids are averaged into those of an unrelated token.
    Losses are means over the whole batch on all devices, where the reference takes each device's.
    The generator's heads keep the main network's head size. Separators between documents of a
    window are never drawn. [MASK] in the text itself may be.

    Attributes:
      mask_probability, random_probability: as in `Masking`, whose other fields hold too.
      task: what the main network is asked.
      generator_width: the generator's D, F and heads as a share of the main network's.
      generator_layers: its depth; None: the main network's.
      tied: share token, position and token-type embeddings and the norm over their sum; False
        gives the generator its own, of its own width.
      temperature: of the samples; 0 takes the likeliest token.
      disallow_correct: never sample the text's own token.
      generator_weight, discriminator_weight: coefficients of the two losses; the reference's 50
        makes up for a binary loss's small size, and a main network that predicts tokens has 1.
    """

    mask_probability: float = 0.85
    random_probability: float = 0.0
    task: Task = "replaced_token_detection"
    generator_width: float = 0.25
    generator_layers: int | None = None
    tied: bool = True
    temperature: float = 1.0
    disallow_correct: bool = False
    generator_weight: float = 1.0
    discriminator_weight: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        tasks = ("replaced_token_detection", "masked_positions_only", "replace_mlm")
        check_choice(self, "task", (*tasks, "all_tokens_mlm"))
        check_range(self, "generator_width", 1e-3, 4.0)
        check_range(self, "temperature", 0.0, 100.0)
        for name in ("generator_weight", "discriminator_weight"):
            check_range(self, name, 0.0, 1e6)
        if self.generator_layers is not None and self.generator_layers < 1:
            raise UserError(
                f"Electra.generator_layers is {self.generator_layers}; it must be at least 1, or "
                "None for the main network's depth"
            )

    # --- device half ---

    def network(self, config: Any) -> Any:
        from objectives import heads_rtd

        return heads_rtd.GeneratorAndDiscriminator(
            config, self._generator_config(config), self.tied, self.task
        )

    def _generator_config(self, config: Any) -> Any:
        from objectives import heads_rtd

        return heads_rtd.generator_config(
            config, self.generator_width, self.generator_layers, self.tied
        )

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        from objectives import losses_rtd

        del frozen
        return losses_rtd.replaced_token_losses(
            apply, params, batch, rng, train,
            stack=self.setting.architecture,
            task=self.task,
            generator_weight=self.generator_weight,
            discriminator_weight=self.discriminator_weight,
            temperature=self.temperature,
            disallow_correct=self.disallow_correct,
            predictions=self.usual_predictions,
        )  # fmt: skip

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        """Of both networks, with logits where they are computed; the sampling counts nothing."""
        from objectives import heads_rtd
        from t5like.models.flops import forward_flops

        drawn = self.usual_predictions
        asked = {"replace_mlm": drawn, "all_tokens_mlm": None}.get(self.task, 0)
        total = forward_flops(self._generator_config(config), spec, drawn)
        total += forward_flops(config, spec, asked)
        if heads_rtd.TASKS[self.task][0]:
            rows, length = spec[f"{self.setting.architecture}_input_tokens"][0]
            total += rows * length * 2.0 * config.d_model * (config.d_model + 1)
        return 3.0 * total
