"""Assembles the ONNX model: public names, inputs and outputs, short names inside."""

from typing import Any

import numpy as np

from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.engines import import_engine
from qkd_jax.deploy.onnx.writer import OnnxNode, Tensor

# The oldest ONNX file format that carries each opset.
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
IR_VERSIONS |= {24: 12, 25: 13}


def onnx_model(export: Export, outputs: list[Tensor]) -> Any:
    """Assembles the ONNX model and gives inputs and outputs their public names."""
    onnx, graph, writer = import_engine("onnx"), export.graph, export.writer
    inputs = [export.tensors[v] for v in graph.inputs]
    names = ["logits"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    for tensor, name in zip(outputs, names, strict=True):
        writer.nodes.append(OnnxNode("Identity", (tensor.name,), (name,), {}, f"{name}/Identity"))
    nodes, constants = writer.live(names)
    nodes = _without_identities(nodes, set(names))
    public = [*(tensor.name for tensor in inputs), *names]
    nodes, constants = _with_short_names(nodes, constants, set(public))
    infos = []
    for value, tensor, name in zip(
        (*graph.inputs, *graph.outputs), (*inputs, *outputs), public, strict=True
    ):
        dims = ["batch" if tensor.shape[a] == -1 else tensor.shape[a] for a in tensor.perm]
        dtype = export.element_type(graph.dtype(value))
        infos.append(onnx.helper.make_tensor_value_info(name, dtype, dims))
    onnx_graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, i, o, name=n, **a) for op, i, o, a, n in nodes],
        type(export.traced.net.model).__name__,
        infos[: len(inputs)],
        infos[len(inputs) :],
        [onnx.numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in constants.items()],
    )
    domains = {"": writer.opset}
    domains |= {node.attributes["domain"]: 1 for node in nodes if "domain" in node.attributes}
    return onnx.helper.make_model(
        onnx_graph,
        opset_imports=[onnx.helper.make_opsetid(*pair) for pair in domains.items()],
        ir_version=IR_VERSIONS[writer.opset],
        producer_name="qkd_jax",
    )


def _with_short_names(
    nodes: list[OnnxNode], constants: dict[str, np.ndarray], public: set[str]
) -> tuple[list[OnnxNode], dict[str, np.ndarray]]:
    """Numbers inner tensors: in a small net names take as many bytes as a layer's weights.

    Nodes, weights and biases are named after their layer.
    """
    kept = public | {n for n, a in constants.items() if a.ndim > 1 or n.endswith("bias")}
    short: dict[str, str] = {}
    for node in nodes:
        for name in (*node.inputs, *node.outputs):
            if name and name not in kept and name not in short:
                short[name] = f"{len(short)}"
    renamed = [_renamed(node, short) for node in nodes]
    return renamed, {short.get(name, name): array for name, array in constants.items()}


def _without_identities(nodes: list[OnnxNode], public: set[str]) -> list[OnnxNode]:
    """Writes a result under its public name where an operation computes it."""
    computed = {name for node in nodes for name in node.outputs}
    names: dict[str, str] = {}
    for node in nodes:
        if node.op == "Identity" and node.inputs[0] in computed and node.outputs[0] in public:
            names.setdefault(node.inputs[0], node.outputs[0])
    return [
        _renamed(node, names)
        for node in nodes
        if node.op != "Identity" or names.get(node.inputs[0]) != node.outputs[0]
    ]


def _renamed(node: OnnxNode, names: dict[str, str]) -> OnnxNode:
    inputs, outputs = (tuple(names.get(n, n) for n in ns) for ns in (node.inputs, node.outputs))
    return node._replace(inputs=inputs, outputs=outputs)
