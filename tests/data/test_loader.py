import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from t5like.data.examples import Document, Window
from t5like.data.loader import load
from t5like.data.pipeline import Component, Pipeline
from tests.data.tiny import Copy, Cut, TinyVocabulary, lognormal_corpus


def pipeline(cache_dir=None):
    corpus = lognormal_corpus(200, mean=3.0)
    return Pipeline(
        [
            Component("windows", corpus, Copy(Window(30))),
            Component("documents", corpus, Cut(Document(40))),
        ],
        vocabulary=TinyVocabulary(),
        architecture="decoder",
        length=64,
        batch_size=4,
        seed=3,
        pack=True,
        cache_dir=cache_dir,
    )


def take(count, *arguments, **settings):
    loader = load(*arguments, **settings)
    found = [(step, Pipeline.hash(batch)) for step, batch in itertools.islice(loader, count)]
    loader.close()
    return found


@pytest.fixture(scope="module")
def expected():
    made = pipeline()
    return [(step, Pipeline.hash(made.batch(step))) for step in range(12)]


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_thread_gives_the_steps_in_order(prefetch, expected):
    assert take(12, pipeline(), prefetch=prefetch) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_from_any_start(workers, expected, tmp_path):
    assert take(7, pipeline(tmp_path), 5, workers=workers) == expected[5:]
    assert take(5, pipeline(tmp_path), 7, workers=0) == expected[7:]


@pytest.mark.parametrize("rows", [(range(2, 4),), (range(3, 4), range(0, 1))])
def test_rows_of_a_process(rows):
    made = pipeline()
    loader = load(made, 2, rows=rows)
    chosen = [row for part in rows for row in part]
    for step, batch in itertools.islice(loader, 3):
        whole = made.batch(step)["decoder_target_tokens"]
        np.testing.assert_array_equal(batch["decoder_target_tokens"], whole[chosen])
    loader.close()


def test_an_error_while_making_a_batch_reaches_the_caller():
    class Broken:
        def batch(self, step, rows):
            if step == 2:
                raise ValueError("step 2 is broken")
            return {}

    with pytest.raises(ValueError, match="step 2 is broken"):
        take(4, Broken())


def test_batches_are_made_ahead():
    class Slow:
        def batch(self, step, rows):
            time.sleep(0.05)
            return {"step": np.array(step)}

    loader = load(Slow(), prefetch=2)
    next(loader)
    next(loader)
    time.sleep(0.3)
    start = time.perf_counter()
    next(loader)
    assert time.perf_counter() - start < 0.04
    loader.close()


def test_the_index_maps_do_not_import_jax():
    modules = ["loader", "layout", "packing", "pipeline", "mixture", "shuffle", "units"]
    code = "import sys\n" + "\n".join(f"import t5like.data.{m}" for m in modules)
    code += "\nassert not {'jax', 'grain', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
