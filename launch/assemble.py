"""From a RunConfig to the host half of a run: vocabulary, corpora, model, objective, batches.

Every command line assembles here, so that training, evaluation, generation and
`show_examples` see the same thing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from launch.run_config import RunConfig
from objectives.base import Objective, Setting
from t5like.data.atomic import is_remote
from t5like.data.corpus import Corpus, build_corpus
from t5like.data.pipeline import Component, Pipeline
from t5like.errors import UserError
from t5like.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Data:
    """The host half of a run.

    Attributes:
      vocabulary: resolved (a trained one is trained or read from the cache).
      corpora: name -> (corpus, rate); the only name of a run of one source is "".
      model: the ModelConfig with its vocab_size filled in.
      objective: bound.
      tracks: track -> bound objective, see Objective.tracks.
      pipelines: track -> its training batches, a function of (seed, the track's step).
    """

    vocabulary: Any
    corpora: Mapping[str, tuple[Corpus, float]]
    model: ModelConfig
    objective: Objective
    tracks: Mapping[str, Objective]
    pipelines: Mapping[str, Pipeline]

    @property
    def pipeline(self) -> Pipeline:
        """Training batches of the first track."""
        return next(iter(self.pipelines.values()))


def cache_directory(config: RunConfig, workdir: str | None) -> epath.Path:
    """Where vocabularies and corpora are built: train.cache_dir, else the workdir's cache.

    They are mapped into memory, which needs a local disk: a workdir in an object store has its
    cache in this machine's folder for such things.
    """
    if config.cache_dir is not None:
        return epath.Path(config.cache_dir)
    if workdir and is_remote(workdir):
        return local_stand_in(workdir)
    return epath.Path(workdir or "runs") / "cache"


def local_stand_in(workdir: str) -> epath.Path:
    """A folder on this machine for the cache of a remote workdir, the same at every start."""
    place = workdir.partition("://")[2].strip("/").replace("/", "-")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return epath.Path(home) / "t5like" / place


def resolve_vocabulary(config: RunConfig, cache: epath.Path):
    """The vocabulary, trained on the first source at first use if it is a trained one."""
    source = next(iter(config.sources().values()))[0]
    return config.vocabulary.resolve(source, cache)


def open_corpus(source, vocabulary, cache: epath.Path, *, progress: bool = True) -> Corpus:
    """The tokenised store of a source, built at first use."""
    directory = cache / f"corpus-{source.fingerprint()}-{vocabulary.fingerprint()}"
    return build_corpus(source, vocabulary, directory, progress=progress)


def bind(
    config: RunConfig, vocabulary, corpus: Corpus | None, cache: epath.Path | None = None
) -> Objective:
    """The run's objective, bound to its vocabulary and lengths."""
    return config.objective.bind(
        Setting(
            architecture=config.model.architecture,
            vocabulary=vocabulary,
            length=config.length,
            targets_length=config.targets_length,
            corpus=corpus,
            cache_dir=cache,
        )
    )


def sized(model: ModelConfig, vocabulary) -> ModelConfig:
    """The model with its embedding sized from the vocabulary, if no page sized it.

    Raises:
      UserError: a page sized it too small for the vocabulary.
    """
    if model.vocab_size is not None:
        if model.vocab_size < vocabulary.size:
            raise UserError(
                f"ModelConfig.vocab_size is {model.vocab_size}, less than the vocabulary's "
                f"{vocabulary.size} ids: set it to None or raise it"
            )
        return model
    rows = -(-vocabulary.size // model.vocab_multiple) * model.vocab_multiple
    return dataclasses.replace(model, vocab_size=rows)


def check_positions(model: ModelConfig, objective: Objective) -> None:
    """Raises UserError if rows are longer than the model's learned positions."""
    longest = max(objective.lengths.inputs, objective.lengths.targets)
    if model.position == "learned" and longest > model.max_length:
        raise UserError(
            f"ModelConfig.max_length is {model.max_length}, but rows hold {longest} tokens and "
            "positions are learned: raise it, or lower train.length"
        )


def make_pipeline(
    config: RunConfig,
    vocabulary,
    objective: Objective,
    corpora: Mapping[str, tuple[Corpus, float]],
    cache: epath.Path,
    *,
    seed: int | None = None,
    shuffle: bool | None = None,
    track: str | None = None,
    order: str | None = None,
) -> Pipeline:
    """Batches of every component of one track's objective over every corpus.

    Args:
      seed, shuffle: in place of the configuration's.
      track: names the components' streams of randomness, where a run has several tracks.
      order: see Component.order.
    """
    components = [
        Component(
            name=_joined(corpus_name, None if track == name else track, name),
            corpus=corpus,
            objective=part_objective,
            rate=corpus_rate * rate,
            order=order and _joined(corpus_name, order),
        )
        for corpus_name, (corpus, corpus_rate) in corpora.items()
        for name, (part_objective, rate) in objective.components().items()
    ]
    return Pipeline(
        components,
        vocabulary=vocabulary,
        architecture=config.model.architecture,
        length=objective.lengths.inputs,
        targets_length=objective.lengths.targets,
        batch_size=config.batch_size,
        seed=config.seed if seed is None else seed,
        pack=config.pack,
        attend_across_documents=config.attend_across_documents,
        shuffle=config.shuffle if shuffle is None else shuffle,
        cache_dir=cache / "packing",
    )


def _joined(*names: str | None) -> str:
    return "/".join(filter(None, names))


def assemble_data(config: RunConfig, workdir: str | None, *, progress: bool = True) -> Data:
    """Vocabulary, corpora, bound objective and training batches of a run."""
    cache = cache_directory(config, workdir)
    vocabulary = resolve_vocabulary(config, cache)
    # An objective that cannot train this architecture must say so before the corpus is built.
    model = sized(config.model, vocabulary)
    check_positions(model, bind(config, vocabulary, None))
    corpora = {
        name: (open_corpus(source, vocabulary, cache, progress=progress), rate)
        for name, (source, rate) in config.sources().items()
    }
    objective = bind(config, vocabulary, next(iter(corpora.values()))[0], cache)
    tracks, orders = objective.tracks(), objective.reading_orders()
    pipelines = {
        name: make_pipeline(
            config, vocabulary, track, corpora, cache,
            track=name if len(tracks) > 1 else None,
            order=orders.get(name),
        )
        for name, track in tracks.items()
    }  # fmt: skip
    return Data(vocabulary, corpora, model, objective, tracks, pipelines)


def assemble_evals(
    config: RunConfig, data: Data, workdir: str | None
) -> dict[str, tuple[str, Pipeline]]:
    """Split -> (track, its held-out batches): one split an eval and track.

    Splits are called as the evals, "EVAL/TRACK" where the run has several tracks. Batches come in
    the corpus's own order and under a fixed seed.
    """
    cache = cache_directory(config, workdir)
    splits = {}
    for name, source in (config.evals or {}).items():
        corpus = open_corpus(source, data.vocabulary, cache)
        for track, objective in data.tracks.items():
            splits[name if len(data.tracks) == 1 else f"{name}/{track}"] = track, make_pipeline(
                config, data.vocabulary, objective.evaluation(), {"": (corpus, 1.0)}, cache,
                seed=0, shuffle=False,
            )  # fmt: skip
    return splits
