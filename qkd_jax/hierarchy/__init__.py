"""Class trees and lowest common ancestors.

    tree = ClassTree.from_dict({"clothes": {"tops": ["shirt", "pullover"], "shoes": ["sneaker"]}})
    tree.lca(tree.index("shirt"), tree.index("sneaker"))     # numbers or arrays, NumPy or jnp
    tree.depth, tree.height, tree.ancestors(node), tree.leaves_under(node)
    TREES["cifar100"]().heights                              # [100, 100], by label
    find("wordnet.is_a.txt#classes.txt", 1000)               # a user's own files

tree   ClassTree
named  trees of known data sets: TREES
files  trees in text files, such as WordNet's
"""

from qkd_jax.hierarchy.named import TREES
from qkd_jax.hierarchy.tree import ClassTree
from qkd_jax.hierarchy.tree_files import find, read

__all__ = ["TREES", "ClassTree", "find", "read"]
