"""Every objective on one device and on meshes of eight; run by test_sharding.py with eight devices.

    python -m tests.launch.sharded_runs FOLDER
"""

from __future__ import annotations

import pathlib
import re
import sys

import jax
import numpy as np

from launch import assemble, config, networks, training
from t5like.data.plans import PlannedBatches
from t5like.errors import UserError
from t5like.training import placement, step as step_lib
from t5like.training.sharding import Sharding, put_replicated
from tests.launch.runs import write_text
from tests.launch.test_every_objective import OWN, PAGES, TINY

ONE = Sharding()
MIXED = Sharding(data=1, fsdp=2, sequence=2, tensor=2)
# name -> (page of gin_configs/sharding, its sizes for eight devices).
PRESETS = {
    "data": ("data", {}),
    "fsdp": ("fsdp", {}),
    "tensor_fsdp": ("tensor_fsdp", {"data": 2, "fsdp": 2}),
    "sequence": ("sequence", {"sequence": 4}),
    "replicas": ("fsdp", {"replica": 2, "data": -1, "fsdp": 2}),
}
# What is tried with more than MIXED: an encoder-decoder, and two networks at once.
THOROUGH = {"span_corruption": (*PRESETS,), "electra": ("fsdp",)}
# One of each track where there are several.
UPDATES = {"biphasic": 2, "mixture": 2}
# Two heads, for tensor = 2, of networks that are smaller; one kv head, which no axis splits.
SHAPES = {
    "causal_lm": {"ModelConfig.num_kv_heads": "1"},
    "electra": {"Electra.generator_width": "0.5"},
    "ernie_gram": {"ErnieGram.generator_size": "0.5"},
}
QUICK = {"xla_backend_optimization_level": 0}


def resolved(folder: pathlib.Path, *pages: str, **settings: str):
    bindings = [
        *TINY, f"TextSource.paths = '{folder / 'text.txt'}'", "train.steps = 4",
        f"train.cache_dir = '{folder / 'cache'}'", "train.batch_size = 16", "train.length = 64",
        "train.targets_length = 64", "train.pack = True", "ModelConfig.num_heads = 4",
        "ModelConfig.head_dim = 8", "ModelConfig.d_ff = 32", "ModelConfig.d_model = 32",
        *(f"{name} = {value}" for name, value in settings.items()),
    ]  # fmt: skip
    return config.load(["runs/small.gin", *pages], bindings)


def preset(name: str) -> Sharding:
    page, sizes = PRESETS[name]
    bindings = [*TINY, "TextSource.paths = 'text.txt'", "train.steps = 1"]
    bindings += [f"Sharding.{axis} = {size}" for axis, size in sizes.items()]
    return config.load(["runs/small.gin", f"sharding/{page}.gin"], bindings).run.sharding


class Case:
    """One page, assembled once."""

    def __init__(self, folder: pathlib.Path, page: str):
        own = dict(item.split(" = ") for item in OWN.get(page, []))
        own |= SHAPES.get(page, {})
        if page == "distillation":
            own["Distillation.teacher_from"] = f"'{folder / 'teacher'}'"
        self.run = resolved(folder, f"objectives/{page}.gin", **own).run
        self.data = assemble.assemble_data(self.run, None, progress=False)
        self.networks = networks.assemble_networks(self.data)
        self.frozen = networks.assemble_frozen(self.data)
        self.init = networks.union_of(self.networks)
        self.plan = self.data.objective.plan(4, self.run.seed)
        self.transform = self.run.optimizer.build(4)
        batches = PlannedBatches(self.data.pipelines, self.plan)
        self.batches = [batches.batch(step) for step in range(UPDATES.get(page, 1))]
        fresh = jax.jit(placement.fresh_state(self.init, self.transform))
        self.fresh = jax.device_get(fresh(step_lib.run_key(0, step_lib.INIT_STREAM)))

    def metrics(self, sharding: Sharding, devices: int) -> tuple[list, list[str]]:
        """(metrics of each update, lowered text of each update) on so many devices."""
        mesh = sharding.mesh(jax.devices()[:devices])
        with sharding.in_force(mesh):
            template = placement.template(
                self.init, self.transform, sharding, mesh, self.frozen
            )
            places = placement.shardings(template)
            state = jax.device_put(self.fresh, places.replace(frozen=None))
            if self.frozen is not None:
                state = state.replace(frozen=self.frozen.read(template.frozen))
            found, texts, key = [], [], put_replicated(jax.random.key(1), mesh)
            for step, batch in enumerate(self.batches):
                track, _ = self.plan.at(step)
                described = training.make_track(self.data, self.networks, track)
                update = step_lib.make_train_step(
                    described.loss_fn, self.transform, self.run.optimizer.schedule(4),
                    declares=described.paths, places=places,
                )  # fmt: skip
                put = sharding.put_batch(mesh, batch)
                lowered = update.lower(state, put, key)
                state, metrics = lowered.compile(QUICK)(state, put, key)
                found.append(jax.device_get(metrics))
                texts.append(lowered.as_text())
            self.state, self.template = state, template
        return found, texts


def same_on_every_mesh(folder: pathlib.Path, page: str) -> None:
    case = Case(folder, page)
    expected, _ = case.metrics(ONE, 1)
    presets = {"mixed": MIXED} | {name: preset(name) for name in THOROUGH.get(page, ())}
    for name, sharding in presets.items():
        found, texts = case.metrics(sharding, 8)
        for step, (ours, one) in enumerate(zip(found, expected, strict=True)):
            for (path, value), (_, wanted) in zip(
                *map(jax.tree_util.tree_leaves_with_path, (ours, one)), strict=True
            ):
                where = f"{page}, {name}, update {step}, {jax.tree_util.keystr(path)}"
                np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=where)
        constraints = sum(text.count("sdy.sharding_constraint") for text in texts)
        assert constraints > 20, f"{page}, {name}: {constraints} constraints in the lowered steps"
        check_pieces(case, sharding, name)
    print("same", page, *presets)


def check_pieces(case: Case, sharding: Sharding, name: str) -> None:
    """Each device holds its part of what is split, optimiser's state and teacher included."""
    parts = sharding.parts(case.template.step.sharding.mesh, "embed")
    for tree in (case.state.params, case.state.opt_state, case.state.frozen or {}):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2]
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        whole = sum(leaf.size for leaf in leaves)
        assert held <= 1.3 * whole / parts, f"{name}: {held} of {whole} in {parts} parts"


def initialises_in_pieces(folder: pathlib.Path) -> None:
    """No device makes more than its part, with room for the random bits of one parameter."""
    case, sharding = Case(folder, "span_corruption"), preset("fsdp")
    mesh = sharding.mesh()
    with sharding.in_force(mesh):
        template = placement.template(case.init, case.transform, sharding, mesh)
        fresh = placement.fresh_state(case.init, case.transform)
        places = placement.shardings(template)
        key = step_lib.run_key(0, step_lib.INIT_STREAM)
        memory = jax.jit(fresh, out_shardings=places).lower(key).compile().memory_analysis()
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(template)]
    assert memory.output_size_in_bytes < sum(sizes) / 4
    assert memory.temp_size_in_bytes < sum(sizes) / 4, (memory.temp_size_in_bytes, sum(sizes))
    print("initialises in pieces")


def goes_on_under_another_sharding(folder: pathlib.Path) -> None:
    """A run saved under FSDP goes on under pure data parallelism with the same losses."""

    def run(workdir, steps, sharding):
        settings = {f"Sharding.{k}": v for k, v in sharding.items()}
        settings |= {"train.steps": steps, "train.checkpoint_every_steps": 1}
        page = config.load(
            ["runs/small.gin", "objectives/causal_lm.gin", "sharding/fsdp.gin"],
            [*TINY, f"TextSource.paths = '{folder / 'text.txt'}'", "train.batch_size = 8",
             f"train.cache_dir = '{folder / 'cache'}'", "ModelConfig.dropout_rate = 0.0",
             *(f"{name} = {value}" for name, value in settings.items())],
        )  # fmt: skip
        return training.train_resolved(page, str(folder / workdir), progress=False).result

    whole = run("straight", 3, {"fsdp": 8})
    run("moved", 2, {"fsdp": 8})
    moved = run("moved", 3, {"fsdp": 1, "data": 8})
    kernel = moved.state.params["model"]["token_embedder"]["embedding"]
    assert kernel.sharding.is_fully_replicated
    a, b = whole.metrics["train"]["loss"], moved.metrics["train"]["loss"]
    np.testing.assert_allclose(a, b, rtol=1e-6)
    print("goes on")


def refuses(folder: pathlib.Path) -> None:
    """What cannot be split ends in one line that names the setting."""
    case = Case(folder, "causal_lm")
    asked = {
        "must multiply to 8": lambda: Sharding(data=3).mesh(),
        "both 'layers' and 'mlp' on 'tensor', and the parameter wi/kernel": lambda: Sharding(
            tensor=2, rules={"layers": "tensor"}
        ).of_parameters(
            Sharding(tensor=2).mesh(),
            {"wi": {"kernel": ("layers", "embed", "mlp")}},
            {"wi": {"kernel": np.zeros((2, 8, 8))}},
        ),
        "both 'embed' and 'heads' on 'tensor', and there are arrays": lambda: Sharding(
            tensor=2, rules={"embed": "tensor"}
        ).mesh(),
        "both 'batch' and 'mlp' on 'fsdp'": lambda: Sharding(
            data=1, fsdp=-1, rules={"mlp": ("tensor", "fsdp")}
        ).mesh(),
        "both 'batch' and 'length' on 'sequence'": lambda: Sharding(
            sequence=2, rules={"batch": ["data", "sequence"]}
        ).mesh(),
        "both 'length' and 'width' on 'sequence'": lambda: Sharding(
            sequence=2, rules={"width": "sequence"}
        ).mesh(),
        "'hidden' is no logical axis": lambda: Sharding(rules={"hidden": "tensor"}),
        "'head' is no logical axis; did you mean 'heads'": lambda: Sharding(rules={"head": None}),
        "rules is .*; it must be a dict": lambda: Sharding(rules=[("mlp", "tensor")]),
        "puts 'mlp' on 3": lambda: Sharding(rules={"mlp": 3}),
        "on 'tensor' twice": lambda: Sharding(rules={"mlp": ("tensor", "tensor")}),
        "Sharding.fsdp is 2.0": lambda: Sharding(fsdp=2.0),
        "Sharding.data is '8'": lambda: Sharding(data="8"),
        "axis 'embed' of parameter .*, 32 long, does not divide into 5": lambda: case.metrics(
            Sharding(fsdp=5), 5
        ),
        "no axis of the mesh": lambda: Sharding(rules={"mlp": "model"}),
        "train.batch_size=12": lambda: Sharding().check_batch(Sharding().mesh(), 12, (64,), 1),
        "rows of 31 tokens": lambda: MIXED.check_batch(MIXED.mesh(), 8, (64, 31), 1),
    }
    for words, call in asked.items():
        try:
            call()
        except UserError as error:
            assert re.search(words, str(error)) and "\n" not in str(error), str(error)
        else:
            raise AssertionError(f"nothing was said of: {words}")
    # What meets on an axis of one device is no collision.
    Sharding(rules={"mlp": "fsdp"}).mesh()
    print("refuses")


def main() -> None:
    assert jax.device_count() == 8
    folder = pathlib.Path(sys.argv[1])
    # Objectives that differ on the host alone compile once.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    write_text(folder / "text.txt", 300)
    teacher = resolved(folder, "objectives/mlm.gin", **{"train.steps": 1})
    training.train_resolved(teacher, str(folder / "teacher"), progress=False)
    refuses(folder)
    initialises_in_pieces(folder)
    goes_on_under_another_sharding(folder)
    for page in (*PAGES, "distillation"):
        same_on_every_mesh(folder, page)


if __name__ == "__main__":
    main()
