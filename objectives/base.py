"""The interface of an objective: the only thing that differs between MLM, UL2, ELECTRA, ...

Host half (NumPy, pure functions of a record and a generator): `unit`, `bounds`, `corrupt`.
Device half (JAX, pure): `network`, `losses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from t5like.data.examples import Example, Lengths, Record, Unit
from t5like.data.plans import Always, Plan
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an objective is bound to before it can work.

    Attributes:
      architecture: "encoder", "decoder" or "encoder_decoder".
      vocabulary: see t5like/data/vocabularies.
      length: tokens of a row (an encoder's inputs, or the one row of an encoder or decoder).
      targets_length: tokens of an encoder-decoder's decoder row; None: the objective decides.
      corpus: the training corpus, for objectives that keep corpus statistics; None where nothing
        will be corrupted (the first check of a configuration, a loaded run).
      cache_dir: a local directory in which such statistics are kept, or None.
    """

    architecture: str
    vocabulary: Any
    length: int
    targets_length: int | None = None
    corpus: Any = None
    cache_dir: Any = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of all objectives. Fields are hyperparameters; `setting` is filled in by `bind`."""

    architectures: ClassVar[tuple[str, ...]] = ()
    # Features of a batch beyond layout.FEATURES, without the name of their stack, and how many
    # members an example has (see t5like.data.examples.Members).
    features: ClassVar[tuple[str, ...]] = ()
    members: ClassVar[int] = 1

    setting: Setting | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def bind(self, setting: Setting) -> Objective:
        """Returns a copy that knows its vocabulary and lengths, or raises UserError."""
        if setting.architecture not in self.architectures:
            raise UserError(
                f"{type(self).__name__} cannot train architecture {setting.architecture!r}; it "
                f"trains {' or '.join(self.architectures)}: set ModelConfig.architecture"
            )
        return dataclasses.replace(self, setting=setting)

    def components(self) -> Mapping[str, tuple[Objective, float]]:
        """Name -> (bound objective, rate), for mixtures drawn per example; itself by default."""
        return {type(self).__name__: (self, 1.0)}

    def tracks(self) -> Mapping[str, Objective]:
        """Track name -> bound objective: what has a network, a loss and batches of its own.

        Itself alone, but for the objectives that are made of others (mixture.py, phases.py).
        """
        return {type(self).__name__: self}

    def plan(self, total_steps: int, seed: int) -> Plan:
        """Which of `tracks` each step of a run of total_steps trains, and with which batch."""
        del total_steps, seed
        return Always(type(self).__name__)

    def reading_orders(self) -> Mapping[str, str]:
        """Track -> a name; tracks of one name read their corpus in one order (Component.order)."""
        return {}

    def evaluation(self) -> Objective:
        """What held-out data is measured with: itself, unless evaluation fixes a setting."""
        return self

    # --- host half ---

    @property
    def unit(self) -> Unit:
        """How the corpus is cut for this objective."""
        raise NotImplementedError

    @property
    def lengths(self) -> Lengths:
        """The row lengths that batches need (`targets` is 0 unless encoder_decoder)."""
        raise NotImplementedError

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        """Upper bounds for a record of raw_length tokens; rng is what `corrupt` will be given."""
        raise NotImplementedError

    def corrupt(self, record: Record, rng: np.random.Generator) -> Example:
        """A pure function of (record, rng)."""
        raise NotImplementedError

    # --- what a trained model can be asked ---

    @property
    def named_tokens(self) -> Mapping[int, str]:
        """Id -> name of tokens that this objective gave a meaning, such as mode tokens."""
        return {}

    @property
    def reads_both_ways(self) -> bool:
        """Whether a decoder trained on this sees a text it is given in both directions."""
        return False

    @property
    def reads_in_place(self) -> bool:
        """Whether a decoder trained on this reads each token at its own slot, seeing both sides.

        As masked language modelling trains it; otherwise it reads BOS, and every token a slot late.
        """
        return False

    @property
    def sees_ahead(self) -> bool:
        """Whether an example's slots, on a decoder alone, may see later ones.

        Batches of objectives that say no have no `decoder_causal_attention` (see layout.py), and
        examples that need it are refused.
        """
        return self.reads_both_ways or self.reads_in_place

    def infilling(self) -> Any | None:
        """How blanks are asked for and answered (see t5like/inference/infill.py), or None."""
        return None

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Example | None:
        """The example that asks for int32 tokens `rest` after `prefix`, or None if none does.

        The prefix may be a decoder's or an encoder's input; `rest` is what has loss, followed by
        EOS.
        """
        del prefix, rest
        return None

    def readable(self, row: Mapping[str, np.ndarray], reader: Any) -> Any | None:
        """Labelled runs of a laid-out row, as objectives/show.py makes them; None: as usual.

        For objectives whose examples mean more than tokens and targets.
        """
        del row, reader
        return None

    # --- device half ---

    def network(self, config: Any) -> Any:
        """A flax Module with the backbone at `model/` and heads by name."""
        raise NotImplementedError

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        """Name -> t5like.training.terms.Term for one batch.

        Args:
          apply: the network's `apply`.
          params: the trained parameters, contents of a "params" collection. Where a run has
            several objectives it holds the heads of them all.
          frozen: what `frozen` gave, in the run's state.
          batch: {feature: [B, L]}, or [B, M, L] where `members` is more than 1.
          rng: a key for dropout and in-step sampling.
          train: whether dropout is on.
        """
        raise NotImplementedError

    def frozen(self, config: Any) -> Any | None:
        """Trees of arrays that losses read and gradients do not reach (a teacher), or None.

        Called once, when a run starts, and gives a t5like.training.state.Frozen; what that reads
        is part of the run's state.
        """
        del config
        return None

    @property
    def device_key(self) -> Any:
        """Objectives with equal keys have one network and one loss, and can share a batch."""
        return dataclasses.replace(self, setting=None)

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether documents that share a window can be hidden from each other."""
        return True

    @property
    def usual_predictions(self) -> int | None:
        """Positions of a row whose logits are computed (see heads.token_losses); None: all."""
        return None

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        """Model FLOPs of a training step on a batch of this spec, forward and backward."""
        from t5like.models.flops import train_flops

        return train_flops(config, spec, self.usual_predictions)
