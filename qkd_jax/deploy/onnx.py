"""ONNX files with QuantizeLinear / DequantizeLinear, written from the graph of the folded net.

The file computes what the net computes: weights are the trained codes (int8) with one scale per
output channel, into which BatchNorm is folded; activations are quantized where the net quantizes
them. A float net gives a float file, so that both can be timed on one engine.

Three things differ from the net's own arithmetic, each by rounding only: engines divide by a scale
where the net multiplies by its reciprocal, they add in another order, and a fused kernel applies
its multiplier once where the file has several operations. A value near the middle between two codes
may fall to the other side. So does one that lies exactly there where a spec has rounding="away":
QuantizeLinear rounds half to even.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax import graph as graphs
from qkd_jax.deploy.onnx_ops import OPERATIONS, unsupported, write_pattern
from qkd_jax.deploy.onnx_patterns import find
from qkd_jax.deploy.onnx_products import write_product
from qkd_jax.deploy.onnx_quantizers import Found, needs_opset_21, write_quantizer
from qkd_jax.deploy.onnx_writer import Tensor, Writer
from qkd_jax.deploy.targets import TARGETS, file_options
from qkd_jax.graph import Node
from qkd_jax.interception import OPERANDS
from qkd_jax.numerics import IntFormat
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.integer_bias import integer_bias
from qkd_jax.ptq.products import TracedNet, is_quantizer, products, trace_net
from qkd_jax.quantize import QuantizedModel

__all__ = ["OnnxFile", "has_vnni", "onnx_session", "to_onnx"]

OPSETS = (13, 21)
ACTIVATIONS = ("uint8", "int8", "own")
DEFAULTS = {"opset": 17, "int4": False, "activations": "uint8"}
INT4_OPSET = 21  # and of codes of more than 8 bits
HOST = "host"
# The oldest ONNX file format that carries each opset.
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """What `to_onnx` wrote.

    Attributes:
        path: the file.
        operations: operation -> number of nodes.
        bytes: size of the file.
        saturating: layers whose codes go wrong on x86 without VNNI (see `to_onnx`).
        stored: layer -> (format of its weight's codes, type they are stored in); ONNX has none of
            1, 2 or 3 bits, so that such codes take an int4 or an int8 each.
    """

    path: Path
    operations: dict[str, int]
    bytes: int
    saturating: tuple[str, ...]
    stored: dict[str, tuple[str, str]]


def to_onnx(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    target: str | None = None,
    int4: bool | None = None,
    activations: str | None = None,
    **kwargs: Any,
) -> OnnxFile:
    """Writes a net, float or quantized, as an ONNX file.

    The input is "images", channels first ([batch, channels, height, width]) for images and as the
    model has it otherwise; the output is "logits". The batch axis is dynamic.

    Args:
        net: the net.
        variables: float or calibrated, folded or not (BatchNorm is folded where it can be).
        images: example input, [batch, height, width, channels]; only its shape and type count.
        path: the file to write.
        opset: ONNX operator set, 13 to 21. Quantized tensors of 9 to 16 bits need 21, and so does
            int4; a target's own opset is raised to it for a net that has them.
        target: what will run the file, a key of `targets.TARGETS`, which decides the options that
            are not given (else opset 17, int4 off, "uint8") and refuses layers whose sums
            would saturate there: on x86 without VNNI, 8-bit weights on 8-bit inputs give wrong
            logits, and accuracy alone does not show it. "host" warns if this machine is such one;
            None does neither. 7-bit weights are safe everywhere, and so is ONNX Runtime with the
            session of `onnx_session`. Where the engine adds biases as integers, they are rounded
            as it would: the file is then the net `ptq.integer_bias(net, variables, images)`.
        int4: store weights of up to 4 bits as int4 or uint4, two to a byte, which needs opset 21.
            Engines for CPUs have no products of them: they unpack such weights when they load the
            file, and run those layers in float.
        activations: the type that holds the codes of activations: "uint8" or "int8" for all, where
            the zero point of a grid of the other kind moves by 128, or "own", each grid's own.
        **kwargs: further arguments of the model's call.

    Returns:
        An `OnnxFile`.

    Raises:
        ImportError: the `export` extra is not installed.
        ValueError: an operation that cannot be written (named with its module), an `opset` or
            `target` out of range, or layers that saturate on the target.
    """
    onnx = _import("onnx")
    checks.one_of("target", target, (None, HOST, *TARGETS))
    wanted: Mapping[str, Any] = file_options(target) if target in TARGETS else DEFAULTS
    int4 = bool(wanted["int4"] if int4 is None else int4)
    if opset is None:
        opset = wanted["opset"]
        if target in TARGETS and (int4 or _is_wide(net)):
            opset = max(opset, INT4_OPSET)
    chosen, activations = activations, activations or wanted["activations"]
    checks.one_of("activations", activations, ACTIVATIONS)
    checks.integer_in("opset", opset, *OPSETS)
    if target in TARGETS and TARGETS[target].file != "onnx":
        raise ValueError(
            f"target is {target!r}, which takes {TARGETS[target].file} and no ONNX file."
        )
    if int4 and opset < INT4_OPSET:
        raise ValueError(f"opset is {opset}, and ONNX has int4 since {INT4_OPSET}; give opset=21.")
    takes = TARGETS.get(target or "")
    rounds = takes is not None and takes.integer_bias and bool(variables.get("quant"))
    folded = (integer_bias if rounds else fold_bn)(net, variables, images, **kwargs)
    traced = trace_net(net, folded, images, **kwargs)
    options: dict[str, Any] = {"opset": opset, "int4": int4}
    options["offset_before_rounding"] = takes is not None and takes.offset_before_rounding
    export = Export(traced, activations=activations, **options)
    outputs = export.write()
    if takes and not takes.keeps_sum_grids and chosen is None and export.sums_of_grids():
        # In int8 no sum is fused with the convolution before it; uint8 came out one code off,
        # one sum in four.
        export = Export(traced, activations="int8", **options)
        outputs = export.write()
    saturating = tuple(export.saturating)
    _check_target(target, saturating)
    model = _model(onnx, export, outputs)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return OnnxFile(path, counts, len(data), saturating, export.stored)


def onnx_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    optimized: str | os.PathLike[str] | None = None,
) -> Any:
    """Opens a file in ONNX Runtime on the CPU, with exact 8-bit products on every x86 processor.

    `session.x64quantprecision` is set on x86 without VNNI: it costs some speed there and avoids the
    16-bit saturation that `to_onnx` describes.

    Args:
        path: an ONNX file.
        threads: threads per operation, or None for the engine's choice.
        optimized: where to write the graph as the engine has optimized it, or None.

    Returns:
        An `onnxruntime.InferenceSession`; run it as `session.run(None, {"images": nchw})`.
    """
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # warnings about missing GPUs say nothing here
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    if _is_x86() and not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Two optimizations that change numbers: a fused 4- or 8-bit MatMul of lower accuracy, and the
    # removal of one of two neighbouring grids as if they were the same.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(
        os.fspath(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["DoubleQDQPairsRemover"],
    )


def has_vnni(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> bool:
    """Whether this processor multiplies 8-bit integers into 32 bits (VNNI or AMX).

    Unknown (no such file, as on macOS or Windows) counts as no.
    """
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")


def _is_wide(net: QuantizedModel) -> bool:
    """Whether any rule asks for codes of more than 8 bits."""
    specs = (getattr(r, o) for r in net.rules for o in OPERANDS)
    return any(spec is not None and spec.bits > 8 for spec in specs)


def _check_target(target: str | None, saturating: tuple[str, ...]) -> None:
    if not saturating or target is None:
        return
    message = (
        f"8-bit weights on 8-bit inputs saturate on x86 without VNNI in: {', '.join(saturating)}. "
        "Give these weights 7 bits, or run ONNX Runtime through `onnx_session`, which sets "
        "session.x64quantprecision=1."
    )
    if target in TARGETS and TARGETS[target].reduce_range:
        raise ValueError(message)
    if target == HOST and _is_x86() and not has_vnni():
        warnings.warn(message, stacklevel=3)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed; it comes with the `export` extra: "
            "in the checkout, pip install -e '.[export]'."
        ) from error


class Export:
    """One export: walks the graph and remembers which ONNX tensor holds which value."""

    def __init__(
        self,
        traced: TracedNet,
        opset: int,
        *,
        int4: bool = False,
        activations: str = "uint8",
        offset_before_rounding: bool = False,
    ):
        self.traced, self.graph = traced, traced.graph
        self.int4, self.activations = int4, activations
        self.offset_before_rounding = offset_before_rounding
        self.stored: dict[str, tuple[str, str]] = {}  # layer -> its codes, and what holds them
        self.writer = Writer(opset)
        self.products = {p.node: p for p in products(traced.graph)}
        self.tensors: dict[int, Tensor] = {}
        self.absorbed: dict[Node, int] = {}  # nodes already computed, and by which value
        self.grids: dict[Any, str] = {}  # tensor and grid -> its dequantized form
        self.written: dict[str, Any] = {}  # dequantized form -> its grid
        self.largest: dict[str, int] = {}  # dequantized form -> its largest code
        self.found: dict[str, Found] = {}  # dequantized form -> its range, found at run time
        self.saturating: list[str] = []
        self.dynamic = set(self.graph.inputs)
        for node in self.graph.nodes:
            if self.dynamic.intersection(node.inputs):
                self.dynamic.update(node.outputs)

    def write(self) -> list[Tensor]:
        """Writes all nodes; returns the results, in the model's own order of axes."""
        for value in self.graph.inputs:
            self.tensors[value] = self.input(value)
        patterns = {p.y: p for p in find(self)}
        inside = {n for p in patterns.values() for n in p.nodes}
        for node in self.graph.nodes:
            if self.dynamic.isdisjoint(node.outputs):
                continue
            if node in inside:
                if node.outputs[0] in patterns:
                    self.tensors[node.outputs[0]] = write_pattern(self, patterns[node.outputs[0]])
                continue
            if node in self.absorbed:
                self.tensors[node.outputs[0]] = self.tensors[self.absorbed[node]]
                continue
            made = self.node(node)
            made = made if isinstance(made, tuple) else (made,)
            self.tensors.update(zip(node.outputs, made, strict=True))
        results = []
        for value in self.graph.outputs:
            if value not in self.tensors:
                raise ValueError("a result of the model does not depend on its input.")
            results.append(self.writer.plain(self.tensors[value], ""))
        return results

    def node(self, node: Node) -> Tensor | tuple[Tensor, ...]:
        """Writes one node; several results come as a tuple."""
        if node.op in graphs.MARKERS:
            if is_quantizer(node):
                return write_quantizer(self, node)
            return self.tensors[node.inputs[0]]
        if node in self.products:
            return write_product(self, self.products[node])
        if node.op not in OPERATIONS:
            raise unsupported(node)
        operands = [self.operand(v) for v in node.inputs]
        return OPERATIONS[node.op](self, node, *operands)

    def input(self, value: int) -> Tensor:
        """Declares an input; images come channels first."""
        shape = self.sizes(value)
        rank = len(shape)
        perm = (0, rank - 1, *range(1, rank - 1)) if rank >= 4 else tuple(range(rank))
        name = "images" if len(self.graph.inputs) == 1 else f"input{len(self.tensors)}"
        return Tensor(self.writer.fresh(name), shape, perm)

    def sums_of_grids(self) -> bool:
        """Whether a sum is written whose two sides are on grids."""
        makers = {name: node[0] for node in self.writer.nodes for name in node[2]}
        return any(
            op == "Add" and all(makers.get(name) == "DequantizeLinear" for name in inputs)
            for op, inputs, *_ in self.writer.nodes
        )

    # -- what the writers of operations use --------------------------------------------------

    def add(self, op: str, inputs: list[str], node: Node, **attributes: Any) -> str:
        """Adds an ONNX node named after the module of a graph node."""
        return self.writer.add(op, inputs, node.scope, **attributes)

    def sizes(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape with -1 for the batch (and for multiples of it)."""
        batch = self.graph.batch or 0
        return tuple(-1 if batch and n and n % batch == 0 else n for n in self.graph.shape(value))

    def shape(self, node: Node) -> tuple[int, ...]:
        """Returns the shape of a node's result, with -1 for the batch."""
        return self.sizes(node.outputs[0])

    def operand(self, value: int) -> Any:
        """Returns a value as a Tensor, or as an array where the input does not reach it."""
        return self.tensors[value] if value in self.dynamic else self.fixed(value)

    def fixed(self, value: int, batch: int = 1) -> np.ndarray:
        """Returns a value that no input reaches; one that depends on the batch has batch size 1."""
        if value in self.graph.constants:
            return np.asarray(self.graph.constants[value])
        node = self.graph.producer(value)
        assert node is not None
        one, two = (
            graphs.execute(node, [self.fixed(v, b) for v in node.inputs], self.graph.batch, b)
            for b in (1, 2)
        )
        place = node.outputs.index(value)
        if batch == 2:
            return np.asarray(two[place])
        first, second = np.asarray(one[place]), np.asarray(two[place])
        if not np.array_equal(np.broadcast_to(first, second.shape), second, equal_nan=True):
            raise unsupported(node, "its values differ along the batch")
        return first

    def storage(self, path: str, format: IntFormat) -> np.dtype:
        """Returns the type that holds the codes of a layer's weight."""
        needs_opset_21(self, path, format)
        dtype = np.dtype(format.storage)
        if self.int4 and format.bits <= 4:
            dtype = np.dtype(jax.numpy.int4 if format.signed else jax.numpy.uint4)
        self.stored[path] = (format.name, dtype.name)
        return dtype

    def same(self, tensor: Tensor, name: str) -> Tensor:
        """Returns a tensor like another one under a new name."""
        return dataclasses.replace(tensor, name=name)

    def result(self, node: Node, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor for a node's result, ordered like one of its operands."""
        return dataclasses.replace(tensor, name=name, shape=self.shape(node))

    def element_type(self, dtype: np.dtype) -> int:
        """Returns ONNX's number for a NumPy type."""
        return int(_import("onnx").helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def aligned(self, node: Node, *operands: Any) -> tuple[list[str], Tensor]:
        """Brings operands of an elementwise operation to one order; returns names and order."""
        tensors = [o for o in operands if isinstance(o, Tensor) and o.perm]
        if not tensors:
            tensors = [o for o in operands if isinstance(o, Tensor)]
        # A channels-first map decides, so that the other one moves and not the map.
        guide = max(tensors, key=lambda t: t.perm != tuple(range(len(t.perm))))
        if any(not _same_order(t, guide) for t in tensors):
            tensors = [self.writer.ordered(t, node.scope) for t in tensors]
            guide = dataclasses.replace(guide, order=None)
        names = []
        for operand in operands:
            if not isinstance(operand, Tensor):
                array = self.writer.like(np.asarray(operand), guide)
                names.append(self.writer.constant(array, _hint(node)))
            elif operand.perm:
                if not _same_order(operand, guide):
                    operand = self.writer.ordered(operand, node.scope)
                names.append(self.writer.arranged(operand, guide.perm, node.scope).name)
            else:
                names.append(operand.name)
        return names, guide

    def takes_mean(self, node: Node, x: Tensor, axes: tuple[int, ...]) -> bool:
        """Whether the sum is only divided by its number of terms; that division is then done."""
        terms = int(np.prod([x.shape[a] for a in axes]))
        return terms > 0 and self._absorbs(node, lambda a: a.ndim == 0 and a == terms)

    def takes_average(self, node: Node, window: tuple[int, ...]) -> int:
        """Absorbs the division behind a sum over windows; returns count_include_pad."""
        if self._absorbs(node, lambda a: a.ndim == 0 and a == np.prod(window)):
            return 1
        ones = np.ones([1 if n == -1 else n for n in self.sizes(node.inputs[0])], np.float32)
        (counts,) = graphs.execute(node, [jax.numpy.asarray(ones)], self.graph.batch, 1)
        counts = np.asarray(counts)
        same = self._absorbs(
            node, lambda a: a.ndim == counts.ndim and bool(np.all(a - counts == 0))
        )
        return 0 if same else 1

    def averaged(self, node: Node) -> bool:
        """Whether the division behind a sum has been absorbed."""
        return node.outputs[0] in self.absorbed.values()

    def _absorbs(self, node: Node, wanted: Any) -> bool:
        (out,) = node.outputs
        reader = self.graph.sole_consumer(out)
        if reader is None or reader.op != "div" or reader.inputs[0] != out:
            return False
        if reader.inputs[1] in self.dynamic or not wanted(self.fixed(reader.inputs[1])):
            return False
        self.absorbed[reader] = out
        return True

    def constant_readers(self, value: int) -> Iterator[tuple[Node, bool, np.ndarray]]:
        """Follows a value through sums and products with constants, as long as it has one reader.

        Yields:
            (node, whether the value is the left operand, the constant).
        """
        while (node := self.graph.sole_consumer(value)) is not None:
            if node.op not in ("add", "sub", "mul", "div") or len(node.inputs) != 2:
                return
            left = node.inputs[0] == value
            other = node.inputs[1 if left else 0]
            if other in self.dynamic:
                return
            with contextlib.suppress(KeyError):
                yield node, left, self.fixed(other)
            value = node.outputs[0]


def _same_order(a: Tensor, b: Tensor) -> bool:
    if a.order is None or b.order is None:
        return a.order is b.order
    return a.order[0] == b.order[0] and np.array_equal(a.order[1], b.order[1])


def _hint(node: Node) -> str:
    return f"{node.scope}/{node.op}_constant" if node.scope else f"{node.op}_constant"


def _model(onnx: Any, export: Export, outputs: list[Tensor]) -> Any:
    """Assembles the ONNX model and gives inputs and outputs their public names."""
    helper, writer = onnx.helper, export.writer
    names = ["logits"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    for tensor, name in zip(outputs, names, strict=True):
        writer.nodes.append(("Identity", (tensor.name,), (name,), {}, f"{name}/Identity"))
    nodes, constants = writer.live(names)
    nodes = _without_identities(nodes, set(names))
    public_names = {*names, *(export.tensors[v].name for v in export.graph.inputs)}
    nodes, constants = _with_short_names(nodes, constants, public_names)
    value_infos = []
    for values, tensors, public in (
        (export.graph.inputs, [export.tensors[v] for v in export.graph.inputs], None),
        (export.graph.outputs, outputs, names),
    ):
        infos = []
        for i, (value, tensor) in enumerate(zip(values, tensors, strict=True)):
            dims = [tensor.shape[a] for a in tensor.perm]
            dims = ["batch" if n == -1 else n for n in dims]
            dtype = export.element_type(export.graph.dtype(value))
            name = public[i] if public else tensor.name
            infos.append(helper.make_tensor_value_info(name, dtype, dims))
        value_infos.append(infos)
    graph = helper.make_graph(
        [helper.make_node(op, i, o, name=n, **a) for op, i, o, a, n in nodes],
        type(export.traced.net.model).__name__,
        *value_infos,
        [onnx.numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in constants.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", writer.opset)],
        ir_version=IR_VERSIONS[writer.opset],
        producer_name="qkd_jax",
    )


def _with_short_names(
    nodes: list[Any], constants: dict[str, np.ndarray], public: set[str]
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Numbers what nobody looks for: in a small net names weigh as much as a layer's weights.

    Nodes, weights and biases are named after their layer.
    """
    kept = public | {n for n, a in constants.items() if a.ndim > 1 or n.endswith("bias")}
    short: dict[str, str] = {}
    for _, inputs, outputs, _, _ in nodes:
        for name in (*inputs, *outputs):
            if name and name not in kept and name not in short:
                short[name] = f"{len(short)}"
    rename = lambda given: tuple(short.get(name, name) for name in given)
    renamed = [(op, rename(i), rename(o), a, name) for op, i, o, a, name in nodes]
    return renamed, {short.get(name, name): array for name, array in constants.items()}


def _without_identities(nodes: list[Any], public: set[str]) -> list[Any]:
    """Lets the maker of a result write it under its public name."""
    renamed = {}
    for op, inputs, outputs, _, _ in nodes:
        made = any(inputs[0] in n[2] for n in nodes) if op == "Identity" else False
        if made and outputs[0] in public and inputs[0] not in renamed:
            renamed[inputs[0]] = outputs[0]
    kept = []
    for op, inputs, outputs, attributes, name in nodes:
        if op == "Identity" and renamed.get(inputs[0]) == outputs[0]:
            continue
        inputs = tuple(renamed.get(i, i) for i in inputs)
        kept.append((op, inputs, tuple(renamed.get(o, o) for o in outputs), attributes, name))
    return kept
