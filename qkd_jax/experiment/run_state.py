"""The mutable state of a run, and its checkpointing: nets, optimizers, rows, the stage and step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import data, metrics, weights
from qkd_jax.data.dataset import Dataset
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings, shapes
from qkd_jax.models import MODELS
from qkd_jax.processes import Group
from qkd_jax.quantize import QuantizedModel, load_float
from qkd_jax.quantize.variables import is_folded, without_layers
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.record.restoring import Restored
from qkd_jax.training.loop import Window
from qkd_jax.training.parallel import StepCache
from qkd_jax.training.profiling import Profile
from qkd_jax.training.state import jit_once, stream_key
from qkd_jax.training.step import eval_step
from qkd_jax.trees import flatten, nested, tree_sha256
from qkd_jax.whole_files import replace_file

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A net on a split: metrics as means, and the logits [examples, classes] in order."""

    metrics: dict[str, float]
    logits: np.ndarray


def without_fresh(name: str, wanted: Variables, source: Mapping[str, Any], fresh: str) -> Variables:
    """Returns a source's weights for a net's layers, without those whose paths match `fresh`.

    Args:
        name: the net's, for the message.
        wanted: the net's variables or their shapes.
        source: variables to take weights from.
        fresh: regular expression of layers' paths; "" for none.

    Raises:
        ValueError: a layer that the source lacks or has in another shape; a `fresh` that matches
            nothing.
    """
    if not fresh:
        return load_float(wanted, source)

    own = flatten(wanted)
    kept = without_layers(own, fresh)
    if len(kept) == len(own):
        raise ValueError(
            f"nets.{name}.fresh is {fresh!r} and matches no layer; there are "
            f"{', '.join(sorted({path.split('/')[1] for path in own}))}. It must match a whole "
            "path, such as 'head'."
        )
    return load_float(nested(kept), nested(without_layers(flatten(dict(source)), fresh)))


@dataclasses.dataclass
class Run:
    """The state of an experiment between stages; stages read and change it.

    Attributes:
        settings: the checked config.
        dataset: the data.
        folder: the run folder, or None where nothing is written.
        checkpoints: the checkpoints, or None where nothing is saved.
        steps: the compiled steps, shared by all stages.
        stopping: whether the run has been asked to stop.
        verbose: whether progress is shown.
        group: the processes of the run, where there are several; only process 0 has a folder and
            walks the schedule, the others have training stages alone.
        profile: which steps are traced.
        origin: of `origin.origin_of`; each checkpoint carries it.
        variables: {net: variables}; a net is there once it has taken part in a stage.
        optimizers: {stage: {net: flat optimizer state}} of the stage that runs and of those that a
            later one continues.
        rows: the results table so far; no times.
        oscillating: {net: {path of a layer: share of its weights that oscillate}}, as the net's
            last training stage left it; empty where that one did not track them.
        heads: {net: [{"head", metrics}]} of the classifiers that its last training stage had beside
            the net, at the end of that stage; a list, as a checkpoint keeps no order of names.
        synthetic: {stage: {"sha256"}} of the images that stages made.
        bases: SHA-256 of all that the state depends on, one for each of the launches of a sweep
            that differ in it; "" stands for one that is not known.
        timings: everything that is a time.
        stage_index: index in the schedule of the stage that runs or comes next.
        stage_step: steps of that stage that are done.
        window: metrics since the last logged line, when a stage was interrupted.
    """

    settings: Settings
    dataset: Dataset
    folder: Any = None
    checkpoints: Checkpoints | None = None
    steps: StepCache = dataclasses.field(default_factory=StepCache)
    stopping: Callable[[], bool] = lambda: False
    verbose: bool = True
    group: Group | None = None
    profile: Profile | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    variables: dict[str, Variables] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    oscillating: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    heads: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    synthetic: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    bases: list[str] = dataclasses.field(default_factory=list)
    timings: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage_index: int = 0
    stage_step: int = 0
    window: Window = dataclasses.field(default_factory=Window)
    _images: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    # --- nets ---------------------------------------------------------------------------------

    @property
    def nets(self) -> dict[str, QuantizedModel]:
        """{net: quantized model}."""
        return self.settings.nets

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape of one image as a batch of one."""
        return jax.ShapeDtypeStruct((1, *self.dataset.image_shape), np.float32)

    def init_net(self, name: str) -> None:
        """Makes a net's variables where it takes part for the first time."""
        if name in self.variables:
            return
        fields = self.settings["nets"][name]
        source, fresh = fields.get("init_from", ""), fields.get("fresh", "")
        net = self.nets[name]
        if not source:
            self.variables[name] = self._random(name)
        elif weights.is_source(source):
            self.variables[name] = self._loaded(name, self._read(name, source), fresh)
        else:
            self.init_net(source)
            variables = self.variables[source]
            if net == self.nets[source] and not fresh:
                self.variables[name] = jax.tree.map(np.asarray, variables)
            elif is_folded(variables):
                raise ValueError(
                    f"nets.{name}.init_from is {source!r}, whose BatchNorms are folded by now, and "
                    "its weights alone would be another net. Let this net take part before that "
                    "stage, and fold it itself."
                )
            else:  # another structure or other rules: the weights, which it must calibrate itself
                self.variables[name] = self._loaded(name, variables, fresh)
        if lender := self.settings["nets"][name].get("head_from", ""):
            self._borrow_head(name, lender)
        self.variables[name] = to_device(self.variables[name])

    def _borrow_head(self, name: str, lender: str) -> None:
        """Copies the classifier of another net, as it is now, into a net."""
        self.init_net(lender)
        own, head = self.variables[name]["params"], self.variables[lender]["params"].get("head")
        if jax.tree.map(np.shape, head) != jax.tree.map(np.shape, own["head"]):
            raise ValueError(
                f"nets.{name}.head_from is {lender!r}, whose head is no dense layer named 'head' "
                f"on its pooled features; nets of {', '.join(MODELS)} have one."
            )
        self.variables[name] = {**self.variables[name], "params": {**own, "head": head}}

    def _read(self, name: str, source: str) -> Variables:
        """A file's weights, for a net whose shapes say what the file does not."""
        return weights.load(source, like=shapes(self.nets[name], self.example.shape))

    def _loaded(self, name: str, source: Mapping[str, Any], fresh: str) -> Variables:
        """A net with a source's weights, and random ones in layers whose paths match `fresh`."""
        loaded = without_fresh(name, shapes(self.nets[name], self.example.shape), source, fresh)
        if not fresh:
            return loaded
        return nested({**flatten(self._random(name)), **flatten(loaded)})

    def _random(self, name: str) -> Variables:
        key = stream_key(self.settings["seed"], f"init/{name}")
        images = np.zeros(self.example.shape, np.float32)
        return jit_once(self.nets[name].init)(key, images)

    def student_steps(self, name: str) -> int:
        """Steps that a net has learned so far, counted from its quantization."""
        return self.settings.student_steps(name, self.step)

    def put(self, name: str, variables: Mapping[str, Any]) -> None:
        """Replaces a net's variables."""
        self.variables[name] = to_device(dict(variables))

    # --- data ---------------------------------------------------------------------------------

    @functools.cached_property
    def _eval_batches(self) -> dict[str, data.EvalBatches]:
        size = self.settings["eval_batch_size"]
        return {s: data.eval_batches(self.dataset, s, size) for s in ("train", "test")}

    def eval_batches(self, split: str) -> data.EvalBatches:
        """The batches of a split, in order, padded, with masks."""
        return self._eval_batches[split]

    @property
    def pixel_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised values of black and of full pixels, float32 [1, 1, channels] each."""
        pixels = np.array([0, 255], np.uint8)[:, None, None, None]
        channels = self.dataset.image_shape[2]
        low, high = self.dataset.normalize(np.broadcast_to(pixels, (2, 1, 1, channels)))
        return low, high

    def keep_images(self, stage: str, images: np.ndarray, labels: np.ndarray) -> None:
        """Keeps the images that a stage made: `synthetic/<stage>.npz`, and its hash."""
        self._images[stage] = {"images": images, "labels": labels}
        self.synthetic[stage] = {"sha256": tree_sha256(self._images[stage])}
        if self.folder is not None:
            replace_file(self._images_file(stage), weights.npz_bytes(self._images[stage]))
            self.folder.write_run(synthetic={stage: self.synthetic[stage]})

    def _images_file(self, stage: str) -> Path:
        return self.folder.path / "synthetic" / f"{stage}.npz"

    def synthetic_images(self, stage: str) -> dict[str, np.ndarray]:
        """{"images" float32, "labels" int32} of a stage that makes images and is done.

        Raises:
            ValueError: the file is not there or not the one that the stage wrote.
        """
        if stage not in self._images:
            path = self._images_file(stage)
            images = weights.read_npz(path)
            if tree_sha256(images) != self.synthetic[stage]["sha256"]:
                raise ValueError(
                    f"{path} does not hold the images of stage {stage!r}; put that file back, "
                    "or run the config in a new folder."
                )
            self._images[stage] = images
        return self._images[stage]

    def give_images(self, stage: str, images: dict[str, np.ndarray]) -> None:
        """Takes the images that a stage made in another process."""
        self._images[stage] = images

    def training_set(self, source: str) -> Dataset:
        """The data set whose training images a stage made; "" is the data set itself.

        Training reads 8-bit images, so those of a stage are rounded to them.
        """
        if not source:
            return self.dataset
        split = self.synthetic_images(source)
        return self.dataset.with_train(self.dataset.pixels(split["images"]), split["labels"])

    def images(self, count: int, *, batch_size: int = 64, source: str = "") -> list[np.ndarray]:
        """The batches of `image_batches`, all in memory."""
        return list(self.image_batches(count, batch_size=batch_size, source=source))

    def image_batches(
        self, count: int, *, batch_size: int = 64, source: str = ""
    ) -> Iterator[np.ndarray]:
        """Yields training images in a random order, without augmentation, in near-equal batches.

        Nothing is padded or dropped, and the sizes of two batches differ by one at most: two
        programs compile. A batch is made when it is asked for.

        Args:
            count: how many images; 0 for the whole split.
            batch_size: the largest batch.
            source: a stage whose images are taken instead, as floats.
        """
        dataset = self.training_set(source)
        total = len(dataset.train_images)
        count = min(count or total, total)
        seed = self.settings["seed"]
        order = data.train_batches(dataset, batch_size=count, seed=seed).indices(0)
        parts = np.array_split(order, -(-count // batch_size))
        if source:
            yield from (self.synthetic_images(source)["images"][index] for index in parts)
        else:
            yield from (dataset.normalize(dataset.train_images[index]) for index in parts)

    def evaluate(
        self, name: str, split: str = "test", variables: Mapping[str, Any] | None = None
    ) -> Evaluation:
        """Evaluates a net on a split; one compilation for each structure of a net."""
        found = list(self._evaluated(name, split, variables))
        whole = np.concatenate([logits for _, logits in found])
        total = functools.reduce(metrics.add, (sums for sums, _ in found))
        return Evaluation({**metrics.finish(total), **self.severity(whole, split)}, whole)

    def mean_loss(self, name: str, split: str, variables: Mapping[str, Any] | None = None) -> float:
        """Returns the mean cross-entropy on a split, of which no logits are kept."""
        found = self._evaluated(name, split, variables)
        return metrics.finish(functools.reduce(metrics.add, (sums for sums, _ in found)))["loss"]

    def _evaluated(
        self, name: str, split: str, variables: Mapping[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yields (sums, logits) of each batch of a split."""
        compiled = eval_step(self.nets[name])
        on_device = to_device(self.variables[name] if variables is None else variables)
        for batch in self.eval_batches(split):
            inputs: dict[str, Any] = {k: batch[k] for k in ("image", "label", "mask")}
            sums, logits = jax.device_get(compiled(on_device, inputs))
            yield sums, logits[batch["mask"]]

    def severity(self, logits: np.ndarray, split: str = "test") -> dict[str, float]:
        """Metrics of the mistakes of logits [examples, classes] by the class tree.

        See `metrics.hierarchical`. Empty where there is no tree; means over mistakes are left out
        where there is no mistake.
        """
        if not self.settings.tree:
            return {}
        of_batch, size = hierarchical_step(self.settings.tree), self.settings["eval_batch_size"]
        total: dict[str, float] = {}
        for batch in self.eval_batches(split).outlines():
            mask = batch["mask"]
            padded = np.zeros((size, logits.shape[1]), np.float32)
            padded[mask] = logits[batch["index"][mask]]
            total = metrics.add(total, jax.device_get(of_batch(padded, batch["label"], mask)))
        means = metrics.finish_hierarchical(total)
        return {k: v for k, v in means.items() if v is not None and k not in ("count", "mistakes")}

    def apply_arguments(self, name: str) -> dict[str, bool]:
        """Arguments that put a net's model into evaluation mode."""
        return mode_arguments(self.nets[name], False)

    # --- saving -------------------------------------------------------------------------------

    def stage(self) -> Stage:
        """The stage that is running or comes next."""
        return self.settings.stages[self.stage_index]

    @property
    def step(self) -> int:
        """Global step: done stages and the steps done in this one."""
        if self.stage_index == len(self.settings.stages):
            return self.settings.total_steps
        return self.stage().first + self.stage_step

    def save(self, *, score: float | None = None, blocking: bool = False) -> None:
        """Saves a checkpoint of everything that resuming needs."""
        if self.checkpoints is not None:
            tree, meta = self.snapshot()
            self.checkpoints.save(self.step, tree, meta, score=score, blocking=blocking)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (arrays, facts): everything that resuming needs, as `load` takes it."""
        meta = {
            "origin": self.origin,
            "stage": "" if self.finished else self.stage().name,
            "stage_index": self.stage_index,
            "stage_step": self.stage_step,
            "window": dataclasses.asdict(self.window),
            "rows": self.rows,
            "oscillating": self.oscillating,
            "heads": self.heads,
            "synthetic": self.synthetic,
            "bases": self.bases or [""],
            "timings": self.timings,
            "lines": 0 if self.folder is None else self.folder.metrics.lines,
        }
        return {"nets": self.variables, "optimizers": self.optimizers}, meta

    def load(self, saved: Restored) -> None:
        """Restores the state that `save` wrote."""
        tree = nested(saved.tree)
        self.variables = {n: to_device(v) for n, v in tree.get("nets", {}).items()}
        self.optimizers = {}
        for name, leaf in saved.tree.items():
            if name.startswith("optimizers/"):
                _, stage, net, rest = name.split("/", 3)
                self.optimizers.setdefault(stage, {}).setdefault(net, {})[rest] = leaf
        self.stage_index = saved.meta["stage_index"]
        self.stage_step = saved.meta["stage_step"]
        self.window = Window(**saved.meta["window"])
        self.rows = saved.meta["rows"]
        self.oscillating = saved.meta.get("oscillating", {})
        self.heads = saved.meta.get("heads", {})
        self.synthetic = saved.meta.get("synthetic", {})
        self.bases = list(saved.meta.get("bases", [""]))
        self.timings = saved.meta["timings"]

    @property
    def follows(self) -> bool:
        """Whether another process leads the run."""
        return self.group is not None and not self.group.leads

    def alone(self, act: Callable[..., None]) -> Callable[..., None]:
        """Returns an act between steps that process 0 does while the others wait for it."""
        group = self.group
        if group is None:
            return act

        def led(*arguments: Any) -> None:
            act(*arguments)
            group.tell({"kind": "done"})

        def wait(*_: Any) -> None:
            group.hear()

        return led if group.leads else wait

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.stage_index == len(self.settings.stages)

    def add_times(self, stage: str, times: Mapping[str, float]) -> None:
        """Adds times of a stage: seconds and steps of interrupted parts add up; rates are new."""
        entry = self.timings.setdefault("stages", {}).setdefault(stage, {})
        for key, value in times.items():
            adds = key == "steps" or key.endswith("seconds")
            entry[key] = entry.get(key, 0) + value if adds else value

    def log(self, stage: Stage, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes a line to metrics.jsonl at a step of a stage (counted from 1)."""
        if self.folder is not None:
            self.folder.metrics.log(stage.first + step, stage.name, split, values)


@functools.lru_cache(maxsize=16)
def hierarchical_step(tree: str) -> Callable[..., Any]:
    """Compiled sums of `metrics.hierarchical`: fn(logits, labels, mask)."""
    return jax.jit(
        lambda logits, labels, mask: metrics.hierarchical(logits, labels, tree=tree, where=mask)
    )


def to_device(tree: Any) -> Any:
    """Puts a tree on the first device; evaluation then compiles once, wherever arrays come from."""
    return jax.device_put(tree, jax.local_devices()[0])
