"""The results of a saved program: arrays in dicts, lists and tuples, readable without a class."""

import dataclasses
from typing import Any

import jax

from qkd_jax.deploy.integer.program import Program


def with_plain_outputs(program: Program) -> Program:
    """Returns a program whose dataclasses and other pytrees are dicts of their fields."""
    tree = plain(jax.tree.unflatten(program.out_tree, program.outputs))
    outputs, out_tree = jax.tree.flatten(tree)
    return dataclasses.replace(program, outputs=tuple(outputs), out_tree=out_tree)


def plain(tree: Any) -> Any:
    """Returns a pytree as dicts, lists and tuples: any other node is a dict of its children."""
    if tree is None or isinstance(tree, int):
        return tree
    if type(tree) in (list, tuple):
        return type(tree)(plain(branch) for branch in tree)
    if type(tree) is dict:
        return {str(name): plain(branch) for name, branch in tree.items()}
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda t: t is not tree)
    if not children or not children[0][0]:
        raise ValueError(
            f"the model returns a {type(tree).__name__}, which is no pytree of arrays; return "
            "arrays, lists, tuples, dicts or dataclasses of them."
        )
    return {_name(path[0]): plain(branch) for path, branch in children}


def _name(key: Any) -> str:
    """Returns the field, the key or the number of a child."""
    return str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind)))
