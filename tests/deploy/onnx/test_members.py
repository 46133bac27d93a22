"""Members of nn.vmap and experts in ONNX: a matrix for each, in one MatMul."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import qkd_jax as qk

X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


class Members(nn.Module):
    """Two layers of three members; the second ones read what the first ones of theirs wrote."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Sequential,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=3,
        )
        x = members([nn.Dense(4), nn.relu, nn.Dense(3)], name="members")(x)
        return nn.Dense(2, name="head")(nn.relu(x).mean(1))


class Experts(nn.Module):
    """A table of matrices with a leading axis, read by an einsum."""

    order: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="stem")(x)).reshape(-1, 2, 4)
        x = nn.Einsum((2, 4, 3), self.order, name="experts")(x)
        return nn.Dense(2, name="head")(nn.relu(x).reshape(x.shape[0], -1))


def written(model, rules, folder):
    """Returns (what ONNX Runtime gives, what the net gives)."""
    net = qk.quantize(model, rules)
    variables = net.init(jax.random.key(1), X)
    # Columns and members of very different sizes, and biases that are not 0.
    rng = np.random.default_rng(2)
    vary = lambda a: (a + 0.1) * np.exp(rng.normal(size=a.shape)).astype(np.float32)
    variables["params"] = jax.tree.map(vary, variables["params"])
    variables = qk.calibrate(net, variables, [X])
    path = str(folder / "net.onnx")
    qk.deploy.to_onnx(net, variables, X, path)
    (out,) = qk.deploy.onnx_session(path).run(None, {"images": X})
    return out, np.asarray(net.apply(variables, X))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("model", [Members(), Experts("bei,eio->beo")])
def test_a_matrix_for_each_member(model, granularity, tmp_path):
    out, wanted = written(model, [qk.Rule(".*", qk.Spec(8, granularity=granularity))], tmp_path)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_experts_that_share_an_input_grid(tmp_path):
    rules = [qk.Rule(".*", qk.Spec(8, granularity="channel"), qk.Spec(8, symmetric=False))]
    out, wanted = written(Experts("bei,eio->beo"), rules, tmp_path)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_members_with_input_grids_of_their_own_are_refused_by_name(tmp_path):
    rules = [qk.Rule(".*", qk.Spec(8), qk.Spec(8, symmetric=False))]
    with pytest.raises(ValueError, match=r"input of 'Dense_0' has 3 scales.*nn.vmap"):
        written(Members(), rules, tmp_path)
