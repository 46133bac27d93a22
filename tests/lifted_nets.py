"""Nets of scanned and vmapped layers, and the same nets with each step and member written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

STEPS, MEMBERS = 3, 2


class Layer(nn.Module):
    """A dense layer of a given width, called as a step of a scan is."""

    features: int

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(self.features, name="up")(x)), None


class Net(nn.Module):
    """Scanned steps, vmapped members that share an input or have their own, or a scan of those.

    Attributes:
        kind: "scan", "shared", "own" or "both".
        axis: along which parameters are stacked.
        apart: whether every step and member is a module of its own.
        features: width.
    """

    kind: str
    axis: int = 0
    apart: bool = False
    features: int = 4

    def lift(self, transform, target, size, **options):
        return transform(
            target,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            **({"length": size} if transform is nn.scan else {"axis_size": size}),
            **options,
        )

    @nn.compact
    def __call__(self, x, train=False):
        if self.kind == "scan":
            x = self.steps(x)
        elif self.kind == "both":
            x = self.steps(jnp.stack([x, 2 - x], 1)).mean(1)
        else:
            x = x if self.kind == "shared" else jnp.stack([x, 2 - x], 1)
            x = self.members(x).mean(1)
        return nn.Dense(3, name="head")(x)

    def members(self, x):
        shared = self.kind == "shared"
        if self.apart:
            one = lambda i: x if shared else x[:, i]
            named = [Layer(self.features, name=f"layers{i}") for i in range(MEMBERS)]
            return jnp.stack([layer(one(i))[0] for i, layer in enumerate(named)], 1)
        axes = {"in_axes": None if shared else 1, "out_axes": (1, None)}
        return self.lift(nn.vmap, Layer, MEMBERS, **axes)(self.features, name="layers")(x)[0]

    def steps(self, x):
        if self.apart and self.kind == "scan":
            for i in range(STEPS):
                x = Layer(self.features, name=f"layers{i}")(x)[0]
            return x
        if self.apart:
            for i in range(STEPS):
                named = [Layer(self.features, name=f"layers{i}_{j}") for j in range(MEMBERS)]
                x = jnp.stack([layer(x[:, j])[0] for j, layer in enumerate(named)], 1)
            return x
        body = Layer
        if self.kind == "both":
            body = self.lift(nn.vmap, Layer, MEMBERS, in_axes=(1, None), out_axes=(1, None))
        return self.lift(nn.scan, body, STEPS)(self.features, name="layers")(x, None)[0]


def written_out(tree, kind, axis):
    """Returns a collection of `Net(kind, axis)` as that of the net with `apart`.

    What a layer keeps is taken apart along `axis`, and arrays of size 1 become numbers, as the
    parameters of a layer that shares them are.
    """
    apart = {name: value for name, value in tree.items() if name != "layers"}
    if "layers" in tree:
        outer = MEMBERS if kind in ("shared", "own") else STEPS
        for i in range(outer):
            one = jax.tree.map(lambda a, i=i: np.take(np.asarray(a), i, axis), tree["layers"])
            if kind != "both":
                apart[f"layers{i}"] = one
                continue
            for j in range(MEMBERS):
                apart[f"layers{i}_{j}"] = jax.tree.map(
                    lambda a, j=j: np.take(np.asarray(a), j, axis), one
                )
    return jax.tree.map(lambda a: np.reshape(a, ()) if a.size == 1 else a, apart)
