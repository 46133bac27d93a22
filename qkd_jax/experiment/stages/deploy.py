"""The `deploy` stage: one trained net becomes files that run elsewhere, and is compared with them.

Into `<run folder>/model` go, for a net `student`:

    student.npz            the trained variables, flat (`init_from` reads it)
    student.onnx           the quantized net with QuantizeLinear / DequantizeLinear
    student_float.onnx     the same architecture in float, for the latency beside it
    student.tflite         for a target of such files, with student_float.tflite: the comparison
                           and the latency are then those of LiteRT
    student/               model.safetensors and model.json: the integer model; model.stablehlo
    student_target.json    for a named target: the file for it, what stays in float there
    layers.json            bits and bytes of every layer
    histograms.json        weights on the code grid, before and after

The comparison is on logits over the whole test split: an engine whose sums saturate can give a
higher accuracy and wrong logits. Where the engine adds biases as integers, the deployed net is
the trained one with its biases rounded so (`ptq.integer_bias`): that net is evaluated in JAX, the
file is compared with it, and the row says beside it how far the trained net is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qkd_jax import checks, deploy, ptq, report, weights
from qkd_jax.data.dataset import Dataset
from qkd_jax.experiment.config_checks import check_rules
from qkd_jax.experiment.results import row
from qkd_jax.experiment.run_state import Evaluation, Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.hierarchy import TREES
from qkd_jax.numerics import codes_of, widened
from qkd_jax.quantize import QuantizedModel, targets
from qkd_jax.quantize.inspection import LayerInfo, layers
from qkd_jax.quantize.variables import quantizer_params
from qkd_jax.quantizers import QUANTIZERS, live
from qkd_jax.record.json_files import write_json
from qkd_jax.trees import find, join

if TYPE_CHECKING:
    from collections.abc import Iterable


def deploy_nets(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    latency_batches: Sequence[int] = (1, 64),
    latency_rounds: int = 100,
    target: str = "",
) -> None:
    """Writes a net's deployable files and adds what they do to its row of the results.

    `latency_rounds` runs of each engine and batch size are timed in turns; 0 times nothing.
    `target` is a key of `deploy.targets.TARGETS` (the config's own `target` where it is empty): it
    chooses the form of the ONNX file, or writes `<net>.tflite` beside it, refuses what would go
    wrong there, and writes `<net>_target.json`, which says what stays in float and what cannot be
    made here. `"host"` warns of 8-bit weights that saturate if this machine is an x86 without VNNI.
    """
    target = target or run.settings["target"]
    for name in nets:
        if not run.variables[name].get("quant"):
            raise ValueError(
                f"stages.{stage.name}.nets has {name!r}, which is float: no calibrate stage has "
                "named it; calibrate it before deploying it."
            )
        _deploy(run, name, latency_batches, latency_rounds, target)


def check_deploy(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a `deploy` stage."""
    where, fields = f"stages.{stage.name}", stage.fields
    target = fields["target"]
    checks.one_of(f"{where}.target", target, ("", "host", *targets.TARGETS))
    for name in stage.nets if target in targets.TARGETS else ():
        try:
            targets.check(nets[name].rules, target)
        except ValueError as error:
            raise ValueError(f"{where}.target: {error} (nets.{name})") from error
    checks.integer_in(f"{where}.latency_rounds", fields["latency_rounds"], 0)
    batches = fields["latency_batches"]
    if not isinstance(batches, list | tuple):
        raise ValueError(f"{where}.latency_batches is {batches!r}; give a tuple, such as (1, 64).")
    for place, size_of_batch in enumerate(batches):
        checks.integer_in(f"{where}.latency_batches[{place}]", size_of_batch, 1)
    check_rules(nets, stage)


def _deploy(run: Run, name: str, latency_batches: Sequence[int], rounds: int, target: str) -> None:
    net, variables = run.nets[name], run.variables[name]
    images = np.zeros(run.example.shape, np.float32)
    folder = run.folder.model
    trained = run.evaluate(name)

    weights.save(folder / f"{name}.npz", variables)
    integer = deploy.convert(net, variables, images)
    description = _description(run.dataset)
    sizes = deploy.save(integer, folder / name, description=description)
    deploy.save_stablehlo(integer, folder / name / "model.stablehlo")
    integer = deploy.load(folder / name)  # what is compared below is what the files hold
    path, path_float = folder / f"{name}.onnx", folder / f"{name}_float.onnx"
    # What runs nowhere here is compared on ONNX Runtime.
    takes = deploy.targets.TARGETS.get(target)
    engine = (
        takes.engine if takes is not None and takes.engine in deploy.ONNX_ENGINES else "onnxruntime"
    )
    onnx_target = target if target and (takes is None or takes.file == "onnx") else None
    unnamed = onnx_target in (None, "host")
    given, deployed = variables, trained
    if unnamed or (takes is not None and takes.integer_bias):
        rounded = ptq.integer_bias(net, variables, images)
        deployed = run.evaluate(name, variables=rounded)
        given = rounded if unnamed else variables  # for a named target, to_onnx rounds itself
    written = deploy.to_onnx(net, given, images, path, target=onnx_target)
    before = _before(run, name)
    deploy.to_onnx(net, before or _floats(variables), images, path_float)
    onnx_bytes = deploy.stamp_onnx(path, description)
    deploy.stamp_onnx(path_float, description)
    opened, file_bytes = lambda file: deploy.open_onnx(file, engine), onnx_bytes
    label = deploy.ONNX_ENGINES[engine]
    if takes is not None and takes.file == "tflite":
        opened, label = deploy.open_tflite, "LiteRT"
        path, path_float = (file.with_suffix(".tflite") for file in (path, path_float))
        lite = deploy.to_tflite(net, variables, images, path, description=description)
        deploy.to_tflite(
            net, before or _floats(variables), images, path_float, description=description
        )
        file_bytes = lite.bytes
    made = folder / f"{name}_target.json"
    made.unlink(missing_ok=True)  # it may speak of an earlier export
    if takes is not None:
        write_json(made, _made(folder, name, target, written))
    runs, runs_float = opened(path), opened(path_float)

    test = run.eval_batches("test")
    # In memory a list spares normalising the same images three times; a streamed set may not fit.
    outlines, test = test.outlines, test if run.dataset.is_streamed else list(test)
    entry = _row(run, name, trained)
    logits = _logits(lambda x: runs(x)[0], test)
    entry["export"] = {
        "engine": label,
        "bytes": file_bytes,
        "saturating_layers": list(written.saturating),
        "biases": "float" if deployed is trained else "integer",
        "deployed_top1": deployed.metrics["top1"],
        **compare(logits, deployed.logits, outlines()),
        "as_trained": distance(logits, trained.logits),
    }
    entry["integer"] = {
        "bytes": integer.nbytes,
        "weight_bytes": integer.weight_bytes,
        "files": sizes,
        **compare(
            _logits(lambda x: deploy.integer_apply(integer, x), test), trained.logits, outlines()
        ),
    }
    infos = layers(net, variables, run.example, **run.apply_arguments(name))
    write_json(folder / "layers.json", [_layer(info) for info in infos])
    write_json(folder / "histograms.json", _histograms(variables, before, infos))
    if rounds:
        timed = {f"{name} {_widths(entry)}": runs, f"{name} float32": runs_float}
        run.timings["latency"] = _latencies(
            timed, label, run.dataset.image_shape, latency_batches, rounds
        )


def _latencies(
    timed: Mapping[str, Any],
    engine: str,
    image_shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Times files on random images of each batch size."""
    rows = []
    for batch in batch_sizes:
        images = np.random.default_rng(0).normal(size=(batch, *image_shape)).astype(np.float32)
        for label, times in deploy.latency(timed, images, rounds=rounds, warmup=3).items():
            rows.append({"model": label, **times, "rounds": rounds, "engine": engine})
    return rows


def _description(dataset: Dataset) -> deploy.Description:
    """The preprocessing of a data set, and the names of its classes where they are known."""
    tree = TREES[dataset.name]() if dataset.name in TREES else None
    return deploy.Description(
        dataset.image_shape,
        tuple(dataset.mean.tolist()),
        tuple(dataset.std.tolist()),
        () if tree is None else tuple(str(tree.names[leaf]) for leaf in tree.classes),
    )


def _made(folder: Path, name: str, target: str, written: deploy.OnnxFile) -> dict[str, Any]:
    """Returns the record of a target: the files written, and what it cannot run on integers."""
    takes = deploy.targets.lookup(target)
    path = written.path
    if takes.file == "stablehlo":
        path = folder / name / "model.stablehlo"
    elif takes.file == "tflite":
        path = folder / f"{name}.tflite"
    found: dict[str, Any] = {
        "target": target,
        "file": str(path.relative_to(folder)),
        "bytes": path.stat().st_size,
        "stays_float_by_the_table": list(takes.stays_float),
        "integers_from_bits": takes.fast,
        "inside_of_products": list(takes.folded_activations),
        "cannot_be_made_here": takes.not_made,
        "sources": list(takes.sources),
    }
    if takes.engine in deploy.ONNX_ENGINES:
        kernels = deploy.kernel_report(path, takes.engine)
        found["integer_products"] = list(kernels.integer)
        found["float_products"] = list(kernels.floating)
    elif takes.engine == "litert":
        ran = deploy.litert_report(path)
        found["integer_operations"] = list(ran.integer)
        found["float_operations"] = list(ran.floating)
        found["conversions"] = ran.conversions
    return found


def _row(run: Run, name: str, evaluation: Evaluation) -> dict[str, Any]:
    """The newest row of a net, or a new one where no stage has evaluated it."""
    rows = [r for r in run.rows if r["net"] == name]
    if not rows:
        run.rows.append(row(run, name, "exported", evaluation))
        return run.rows[-1]
    return rows[-1]


def _widths(row: Mapping[str, Any]) -> str:
    return f"w{row['weight_bits']}a{row['activation_bits']}"


def _floats(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in variables.items() if k != "quant"}


def _before(run: Run, name: str) -> dict[str, Any] | None:
    """The net's variables from before it was quantized, which its `calibrate` stage has kept."""
    path = run.folder.model / f"{name}_float.npz"
    return weights.load(path) if path.exists() else None


def _logits(predict: Callable[[Any], Any], batches: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Logits of a split, [examples, classes], from batches that are padded, with masks."""
    return np.concatenate([np.asarray(predict(b["image"]))[b["mask"]] for b in batches])


def compare(
    logits: np.ndarray, wanted: np.ndarray, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Compares an engine's logits with those of the net that it runs.

    Args:
        logits: of the engine, [examples, classes].
        wanted: of the net, in the same order.
        batches: the split, padded, with masks, in the same order.

    Returns:
        top1 of the engine, argmax_agreement (share of examples), max_logit_difference.
    """
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    return {"top1": float(np.mean(logits.argmax(-1) == labels)), **distance(logits, wanted)}


def distance(logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Share of examples with the same argmax, and the largest difference of logits."""
    return {
        "argmax_agreement": float(np.mean(logits.argmax(-1) == wanted.argmax(-1))),
        "max_logit_difference": float(np.max(np.abs(logits - wanted))),
    }


def _layer(info: LayerInfo) -> dict[str, Any]:
    spec = info.weight
    return {
        "path": info.path,
        "kind": info.kind,
        "shape": list(info.weight_shape),
        "params": info.params,
        "weight_bits": spec.bits if spec else None,
        "input_bits": info.input.bits if info.input else None,
        "bytes": -(-info.bits // 8),
        "quantizer": spec.label if spec else None,
    }


def _histograms(
    variables: Mapping[str, Any], before: Mapping[str, Any] | None, infos: Sequence[LayerInfo]
) -> dict[str, Any]:
    """Float weights and codes of every layer whose kernel is quantized."""
    specs = {info.path: info.weight for info in infos if info.weight is not None}
    given = {
        path: (kernel, params)
        for path in specs
        if (kernel := find(variables["params"], join(path, "kernel"))) is not None
        and (params := quantizer_params(variables, path, "weight")) is not None
        and _has_codes(specs[path], params)
    }

    @jax.jit  # all layers in one program: one by one, each shape would compile ten
    def quantized(given: Any) -> Any:
        found = {}
        for path, (kernel, params) in given.items():
            quantizer, spec = QUANTIZERS[specs[path].quantizer], specs[path]
            kernel = widened(kernel)
            params = live(kernel, params, spec)
            scale, _, _ = quantizer.integer_view(params, spec)
            hat = quantizer.fake_quant(kernel, params, spec)
            found[path] = {"codes": codes_of(hat, scale), "scale": scale}
        return found

    return report.weight_histograms(
        {
            path: {
                **values,
                "weight": np.asarray(given[path][0]),
                "before": before and find(before["params"], join(path, "kernel")),
                "label": specs[path].label,
            }
            for path, values in jax.device_get(quantized(given)).items()
        }
    )


def _has_codes(spec: Any, params: Any) -> bool:
    """Whether a weight is integer codes with a scale that its layer stores."""
    if spec.dynamic or isinstance(spec.granularity, int):
        return False
    return QUANTIZERS[spec.quantizer].integer_view(params, spec) is not None
