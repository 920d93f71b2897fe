"""Retrieval with a bi-encoder: rankings by the similarity of embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.evaluation import metrics
from t5like.evaluation.model import TrainedModel, pooled_states
from t5like.evaluation.tasks import RetrievalLoader, RetrievalTask
from t5like.evaluation.tuning import adamw, tune

Transform = Literal["none", "centre", "whiten"]


@dataclasses.dataclass(frozen=True)
class _BiEncoder:
    """Fields and figures of both measures; see Retrieval."""

    task: RetrievalLoader
    transform: Transform = "centre"
    k: int = 10
    length: int = 64
    batch_size: int = 64

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {f"ndcg@{self.k}": True, f"recall@{self.k}": True}

    def _figures(self, model: TrainedModel) -> dict[str, float]:
        task = self.task.load()
        documents, queries = (
            model.embed(texts, length=self.length, batch_size=self.batch_size)
            for texts in (task.documents, task.queries)
        )
        scores = cosines(*transformed(queries, documents, self.transform))  # [Q, N]
        gains = task.gain_matrix()
        return {
            f"ndcg@{self.k}": float(metrics.ndcg(scores, gains, self.k).mean()),
            f"recall@{self.k}": float(metrics.recall(scores, gains, self.k).mean()),
        }


@dataclasses.dataclass(frozen=True)
class Retrieval(_BiEncoder):
    """nDCG and recall of documents ranked by the cosine of mean-pooled last states, zero-shot.

    Attributes:
      task: queries, documents and which belong together.
      transform: of the embeddings: "centre" subtracts the documents' mean, which takes away what
        all texts share; "whiten" also gives all directions of the documents unit variance (Su et
        al. 2021, section 3.2); "none".
      k: rank at which both figures are taken.
      length: tokens of a text that are read.
      batch_size: texts embedded at once.
    """

    def measure(self, model: TrainedModel, seed: int) -> dict[str, float]:
        """{"ndcg@K", "recall@K"}: means over the queries, from 0 to 1. Nothing is random."""
        del seed
        return self._figures(model)


@dataclasses.dataclass(frozen=True)
class FineTunedRetrieval(_BiEncoder):
    """As Retrieval, after a short contrastive training on a few labelled queries.

    Each update embeds queries and one relevant document of each; a query's own document is to be
    the nearest of the batch's (InfoNCE with in-batch negatives, as Karpukhin et al. 2020, section
    3.2; cosine over a temperature). Documents that are relevant to the query too are no negatives.

    Attributes:
      labelled: of the task's train queries, how many are learned from; the seed draws them.
      steps: updates.
      queries_per_step: of the labelled ones.
      learning_rate: the highest; AdamW as in FineTune.
      temperature: of the cosines.
    """

    labelled: int = 50
    steps: int = 40
    queries_per_step: int = 16
    learning_rate: float = 1e-3
    temperature: float = 0.05

    def measure(self, model: TrainedModel, seed: int) -> dict[str, float]:
        """As Retrieval.measure; the seed draws the labelled queries and the batches.

        Raises:
          UserError: the task has too few train queries.
        """
        task = self.task.load()
        tuned = tune(
            model.params,
            self._batches(model, task, seed),
            loss=contrastive_loss,
            config=model.config,
            optimizer=adamw(self.learning_rate, self.steps),
            steps=self.steps,
            seed=seed,
        )
        return self._figures(dataclasses.replace(model, params=tuned))

    def _batches(self, model: TrainedModel, task: RetrievalTask, seed: int) -> Iterator[dict]:
        if not self.queries_per_step <= self.labelled <= len(task.train_queries):
            raise UserError(
                f"FineTunedRetrieval.labelled is {self.labelled}; it must lie between "
                f"queries_per_step = {self.queries_per_step} and the task's "
                f"{len(task.train_queries)} train queries"
            )
        chosen = generator(seed, "labelled").permutation(len(task.train_queries))[: self.labelled]
        gains = [task.train_gains[i] for i in chosen]
        relevant = sorted({d for wanted in gains for d in wanted})
        place = {d: i for i, d in enumerate(relevant)}
        queries = model.rows([task.train_queries[i] for i in chosen], self.length)
        documents = model.rows([task.documents[d] for d in relevant], self.length)
        for step in range(self.steps):
            rng = generator(seed, "contrastive", step)
            rows = rng.permutation(self.labelled)[: self.queries_per_step]
            picked = [sorted(gains[i])[rng.integers(len(gains[i]))] for i in rows]
            also = np.array([[d in gains[i] for d in picked] for i in rows])
            places = np.array([place[d] for d in picked])
            yield {
                name: np.concatenate([queries[name][rows], documents[name][places]])
                for name in queries
            } | {
                "hidden": also & ~np.eye(len(rows), dtype=bool),
                "temperature": np.float32(self.temperature),
            }


def contrastive_loss(params: Any, batch, key: jax.Array | None, config) -> jax.Array:
    """Mean InfoNCE of rows [2Q, L], queries first; `hidden` bool [Q, Q] are no negatives."""
    states = pooled_states(params, batch, config, "mean", key)
    states /= jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-6)
    queries, documents = jnp.split(states, 2)
    logits = jnp.where(batch["hidden"], -jnp.inf, queries @ documents.T / batch["temperature"])
    own = jnp.arange(len(queries))
    return optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()


def transformed(
    queries: np.ndarray, documents: np.ndarray, transform: Transform
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [Q, D] and [N, D] in coordinates taken from the documents; see Retrieval.

    Raises:
      UserError: there is no such transform.
    """
    if transform == "none":
        return queries, documents
    if transform not in ("centre", "whiten"):
        raise UserError(
            f"Retrieval.transform is {transform!r}; it must be 'none', 'centre' or 'whiten'"
        )
    mean = documents.mean(axis=0)
    queries, documents = queries - mean, documents - mean
    if transform == "whiten":
        variances, directions = np.linalg.eigh(np.cov(documents, rowvar=False))
        # Directions without variance say nothing: their scale is bounded.
        scale = directions / np.sqrt(np.maximum(variances, 1e-6 * variances.max()))
        queries, documents = queries @ scale, documents @ scale
    return queries, documents


def cosines(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[Q, D], [N, D] -> [Q, N]."""
    queries, documents = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (queries, documents)
    )
    return queries @ documents.T
