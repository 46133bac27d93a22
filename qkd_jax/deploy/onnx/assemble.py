"""Assembles the ONNX model: public names, inputs and outputs, short names inside."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor

__all__ = ["model"]

# The oldest ONNX file format that carries each opset.
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


def model(onnx: Any, export: Export, outputs: list[Tensor]) -> Any:
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
