"""Writes features.npz: values and gradients of losses on features and batches, by PyTorch.

Everything is float64; gradients come from torch's autograd. torchdistill is the reference where it
computes what the paper or the authors' code does (attention transfer, PKT, RKD, VID, factor
transfer, activation boundaries, the hierarchical context loss); the others are restated with
torch.nn.functional.

    pip install torch==2.14.1 torchvision torchdistill==1.1.5
    python tests/golden/make_features.py

The test suite reads the file and does not need PyTorch. Results have the key
"<loss>|<hyper-parameters>|<inputs>|<argument>": the gradient of the mean over the batch for an
argument, and "value", that mean. Arrays of inputs are "<inputs>/<argument>", with "/0", "/1" for
the entries of tuples.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchdistill.losses import mid_level

PATH = "path"
ONE = {"path": PATH, "io": "output"}


def pairs_of(names, **extra):
    return {
        n: {"student": {"path": n, "io": "output"}, "teacher": {"path": n, "io": "output"}} | extra
        for n in names
    }


def outputs(features):
    return {str(i): {"output": f} for i, f in enumerate(features)}


def chw(x):
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def pooled(s, t):
    size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
    return F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)


def fitnet(student_feature, teacher_feature):
    s, t = chw(student_feature), chw(teacher_feature)
    return F.mse_loss(*(pooled(s, t) if s.ndim == 4 else (s, t)))


def at(student_features, teacher_features, mode="code"):
    both = [pooled(chw(s), chw(t)) for s, t in zip(student_features, teacher_features, strict=True)]
    names = [str(i) for i in range(len(both))]
    loss = mid_level.ATLoss(pairs_of(names, weight=1), mode=mode)
    return loss(outputs([s for s, _ in both]), outputs([t for _, t in both]))


def at_cubed(student_features, teacher_features, **_):
    def attention(x):
        return F.normalize(x.abs().pow(3).mean(1).flatten(1))

    return sum(
        F.mse_loss(*map(attention, pooled(chw(s), chw(t))))
        for s, t in zip(student_features, teacher_features, strict=True)
    )


def vid(student_features, teacher_features, variances):
    loss = mid_level.VIDLoss(pairs_of([str(i) for i in range(len(variances))], weight=1))
    means = [chw(x) for x in student_features]
    spread = [v[None, :, None, None].expand_as(m) for m, v in zip(means, variances, strict=True)]
    given = outputs(list(zip(means, spread, strict=True)))
    return loss(given, outputs([chw(x) for x in teacher_features]))


def ft(student_feature, teacher_feature):
    loss = mid_level.FTLoss(p=1, paraphraser_path="0", translator_path="0")
    return loss(outputs([chw(student_feature)]), outputs([chw(teacher_feature)]))


def reviewkd(student_features, teacher_features):
    loss = mid_level.HierarchicalContextLoss("0", "output", "0", "output")
    return sum(
        loss(outputs([(chw(s), None)]), outputs([chw(t)]))
        for s, t in zip(student_features, teacher_features, strict=True)
    )


def semckd(student_features, teacher_features, attention):
    total = 0
    for i, row in enumerate(student_features):
        for j, (s, t) in enumerate(zip(row, teacher_features, strict=True)):
            s, t = pooled(chw(s), chw(t))
            error = F.mse_loss(s, t, reduction="none").flatten(1).mean(1)
            total = total + (attention[:, i, j] * error).sum()
    return total / (attention.shape[0] * attention.shape[1])


def nst(student_features, teacher_features):
    total = 0
    for s, t in zip(student_features, teacher_features, strict=True):
        s, t = (F.normalize(x.flatten(2), dim=2) for x in pooled(chw(s), chw(t)))
        means = [(a @ b.transpose(1, 2)).pow(2).mean() for a, b in ((t, t), (s, s), (s, t))]
        total = total + means[0] + means[1] - 2 * means[2]
    return total


def fsp(student_features, teacher_features):
    def flow(a, b):
        a, b = pooled(chw(a), chw(b))
        return torch.einsum("bcn,bdn->bcd", a.flatten(2), b.flatten(2)) / a[0, 0].numel()

    return sum(
        F.mse_loss(flow(*student_features[i : i + 2]), flow(*teacher_features[i : i + 2]))
        for i in range(len(student_features) - 1)
    )


def ickd(student_feature, teacher_feature):
    def rows(x):
        x = chw(x).flatten(2)
        return F.normalize(x @ x.transpose(1, 2), dim=2)

    s, t = rows(student_feature), rows(teacher_feature)
    return (s - t).pow(2).sum() / (s.shape[0] * s.shape[1])


def ab(student_features, teacher_features, margin=1.0):
    n = len(student_features)
    table = {}
    for i in range(n):
        table |= pairs_of([str(i)], weight=2.0 ** (i + 1 - n))
    loss = mid_level.AltActTransferLoss(table, margin=margin, reduction="mean")
    return loss(outputs(map(chw, student_features)), outputs(map(chw, teacher_features)))


def ofd(student_features, teacher_features, margins):
    total, n = 0, len(margins)
    for i, (s, t, m) in enumerate(zip(student_features, teacher_features, margins, strict=True)):
        s, m = chw(s), m[None, :, None, None]
        t = torch.maximum(chw(t), m)
        off = (s <= t) & (t <= 0)
        total = total + ((s - t) ** 2 * ~off).sum() / 2 ** (n - 1 - i) / s.shape[0]
    return total


def rkd(student_feature, teacher_feature, distance=25.0, angle=50.0):
    loss = mid_level.RKDLoss("0", "0", dist_factor=distance, angle_factor=angle, reduction="mean")
    return loss(outputs([student_feature]), outputs([teacher_feature]))


def sp(student_feature, teacher_feature):
    def gram(x):
        return F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1)

    return F.mse_loss(gram(student_feature), gram(teacher_feature))


def pkt(student_feature, teacher_feature):
    loss = mid_level.PKTLoss("0", "output", "0", "output")
    return loss(outputs([student_feature.flatten(1)]), outputs([teacher_feature.flatten(1)]))


def cc(student_feature, teacher_feature, gamma=0.4, order=2):
    def kernel(x):
        cosine = F.normalize(x.flatten(1)) @ F.normalize(x.flatten(1)).T
        series = sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))
        return math.exp(-2 * gamma) * series

    return F.mse_loss(kernel(student_feature), kernel(teacher_feature))


def cc_adjacent(student_embedding, teacher_embedding):
    gap = (student_embedding - teacher_embedding).abs()
    return (gap[1:] * gap[:-1]).sum(1).mean()


def irg(student_logits, teacher_logits, student_features, teacher_features, vertex=0.1):
    def edges(x):
        square = (x.flatten(1)[:, None] - x.flatten(1)[None]).pow(2).sum(-1)
        return square / square.max()

    def change(first, second):
        first, second = pooled(chw(first), chw(second))
        ratio = second.shape[1] // first.shape[1]
        second = torch.stack([second[:, i::ratio] for i in range(ratio)]).mean(0)
        square = (first - second).flatten(1).pow(2).sum(1)
        return square / square.max()

    both = list(zip(student_features, teacher_features, strict=True))
    edge = sum(F.mse_loss(edges(s), edges(t)) for s, t in both) / len(both)
    transformation = F.mse_loss(change(*student_features[:2]), change(*teacher_features[:2]))
    return vertex * F.mse_loss(student_logits, teacher_logits) + 5 * edge + 5 * transformation


def crd_in_batch(student_embedding, teacher_embedding, labels, temperature=0.07):
    scores = F.normalize(student_embedding) @ F.normalize(teacher_embedding).T / temperature
    same = (labels[:, None] == labels[None]) & ~torch.eye(len(labels), dtype=torch.bool)
    right = torch.arange(len(labels))
    ways = (scores, scores.T)
    return sum(F.cross_entropy(s.masked_fill(same, -math.inf), right) for s in ways)


def dist(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=1.0):
    def relation(p, q):
        p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
        return 1 - ((p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1) + 1e-8)).mean()

    p, q = (F.softmax(z / temperature, dim=1) for z in (student_logits, teacher_logits))
    return temperature**2 * (beta * relation(p, q) + gamma * relation(p.T, q.T))


def mlkd(student_logits, teacher_logits, temperature=4.0, compat=0, standardize=0):
    certain = F.softmax(teacher_logits, dim=1)
    unsure = (certain.amax(1) <= certain.amax(1).quantile(0.5)).double()
    rare = (certain.sum(0) <= certain.sum(0).quantile(0.5)).double()
    total = 0
    for t in (temperature, 2, 3, 5, 6):
        soft = (student_logits, teacher_logits)
        if standardize:
            soft = [(z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in soft]
        log_p, log_q = (F.log_softmax(z / t, dim=1) for z in soft)
        kl = t**2 * F.kl_div(log_p, log_q.exp(), reduction="none").sum(1)
        p, q = (F.softmax(z / t, dim=1) for z in (student_logits, teacher_logits))
        batch = (p @ p.T - q @ q.T).pow(2).sum(1)
        classes = (p.T @ p - q.T @ q).pow(2).sum(1)
        if compat:
            total = total + (kl.mean() * unsure).mean() + (batch.mean() * unsure).mean()
            total = total + (classes.mean() * rare).mean()
        else:
            total = total + (kl * unsure).mean() + (batch * unsure).mean()
            total = total + (classes * rare).mean()
    return total


def ctkd(student_logits, teacher_logits, temperature, reversal=1.0):
    t = temperature
    if temperature.requires_grad:
        # The value of T, and -reversal times its gradient.
        t = (1 + reversal) * temperature.detach() - reversal * temperature
    t = t.expand(student_logits.shape[0])[:, None]
    log_p, q = F.log_softmax(student_logits / t, dim=1), F.softmax(teacher_logits / t, dim=1)
    return (t[:, 0] ** 2 * F.kl_div(log_p, q, reduction="none").sum(1)).mean()


def kl(student, p, t):
    return t**2 * F.kl_div(F.log_softmax(student / t, 1), p, reduction="none").sum(1)


def kd_mean(student_logits, teachers_logits, temperature=4.0):
    p = torch.stack([F.softmax(z / temperature, 1) for z in teachers_logits]).mean(0)
    return kl(student_logits, p, temperature).mean()


def kd_sum(student_logits, teachers_logits, temperature=4.0):
    t = temperature
    return sum(kl(student_logits, F.softmax(z / t, 1), t).mean() for z in teachers_logits)


def ca_mkd(student_logits, teachers_logits, labels, temperature=4.0):
    t = temperature
    errors = [F.cross_entropy(z, labels, reduction="none") for z in teachers_logits]
    weights = (1 - F.softmax(torch.stack(errors), 0)) / (len(errors) - 1)
    losses = torch.stack([kl(student_logits, F.softmax(z / t, 1), t) for z in teachers_logits])
    return (weights * losses).sum(0).mean()


RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def maps(*shapes):
    return tuple(normal(*shape) for shape in shapes)


INPUTS = {
    "map": {"student_feature": normal(4, 5, 5, 3), "teacher_feature": normal(4, 5, 5, 3)},
    "mixed_map": {"student_feature": normal(3, 7, 6, 4), "teacher_feature": normal(3, 4, 9, 4)},
    "variances": {"variances": (np.float32([0.3, 4.0]), np.float32([0.5, 1.0, 2.0, 3.0]))},
    "vector": {"student_feature": normal(6, 5), "teacher_feature": normal(6, 8)},
    "map_and_vector": {"student_feature": normal(4, 2, 3, 2), "teacher_feature": normal(4, 9)},
    "maps": {
        "student_features": maps((3, 6, 6, 2), (3, 3, 3, 4)),
        "teacher_features": maps((3, 6, 6, 2), (3, 3, 3, 4)),
    },
    "mixed_maps": {
        "student_features": maps((3, 7, 7, 2), (3, 3, 3, 4)),
        "teacher_features": maps((3, 4, 4, 5), (3, 5, 5, 3)),
    },
    "high_maps": {
        "student_features": maps((2, 7, 7, 2), (2, 2, 2, 3), (2, 1, 1, 4)),
        "teacher_features": maps((2, 7, 7, 2), (2, 2, 2, 3), (2, 1, 1, 4)),
    },
    "margins": {"margins": (np.float32([-0.5, -0.1]), np.float32([-0.2, -0.9, 0.0, -2.0]))},
    "semantic": {
        "student_features": (maps((3, 6, 6, 2), (3, 3, 3, 4)), maps((3, 4, 4, 2), (3, 4, 4, 4))),
        "teacher_features": maps((3, 6, 6, 2), (3, 3, 3, 4)),
        "attention": RNG.dirichlet([1.0, 1.0], (3, 2)).astype(np.float32),
    },
    "embedding": {"student_embedding": normal(6, 5), "teacher_embedding": normal(6, 5)},
    "labels": {"labels": np.int32([0, 1, 2, 1, 0, 3])},
    "logits": {
        "student_logits": normal(6, 5, scale=2),
        "teacher_logits": normal(6, 5, scale=3),
    },
    "graph": {
        "student_logits": normal(4, 5),
        "teacher_logits": normal(4, 5),
        "student_features": maps((4, 6, 6, 2), (4, 3, 3, 4), (4, 7)),
        "teacher_features": maps((4, 6, 6, 3), (4, 3, 3, 6), (4, 5)),
    },
    "teachers": {
        "student_logits": normal(6, 5, scale=2),
        "teachers_logits": tuple(normal(6, 5, scale=3) for _ in range(3)),
    },
    "temperature": {"temperature": np.float32(3.0)},
    "temperatures": {"temperature": np.float32([1, 2, 3, 4, 5, 6])},
}

# (loss, hyper-parameters, inputs joined by "+", the reference's function)
CASES = [
    ("fitnet", "", "map", fitnet),
    ("fitnet", "", "mixed_map", fitnet),
    ("simkd", "", "mixed_map", fitnet),
    ("at", "", "maps", at),
    ("at", "", "mixed_maps", at),
    ("at", "mode=paper", "mixed_maps", at),
    ("at", "power=3", "maps", at_cubed),
    ("vid", "", "maps+variances", vid),
    ("ft", "", "map", ft),
    ("reviewkd", "", "maps", reviewkd),
    ("reviewkd", "", "high_maps", reviewkd),
    ("semckd", "", "semantic", semckd),
    ("nst", "", "mixed_maps", nst),
    ("fsp", "", "maps", fsp),
    ("fsp", "", "high_maps", fsp),
    ("ickd", "", "mixed_map", ickd),
    ("ab", "", "maps", ab),
    ("ab", "margin=0.5", "maps", ab),
    ("ofd", "", "maps+margins", ofd),
    ("rkd", "", "vector", rkd),
    ("rkd", "distance=1,angle=2", "vector", rkd),
    ("sp", "", "map_and_vector", sp),
    ("sp", "", "vector", sp),
    ("pkt", "", "vector", pkt),
    ("cc", "", "vector", cc),
    ("cc", "gamma=0.7,order=3", "map_and_vector", cc),
    ("cc_adjacent", "", "embedding", cc_adjacent),
    ("irg", "", "graph", irg),
    ("irg", "vertex=0.5", "graph", irg),
    ("crd_in_batch", "", "embedding+labels", crd_in_batch),
    ("crd_in_batch", "temperature=0.5", "embedding+labels", crd_in_batch),
    ("dist", "", "logits", dist),
    ("dist", "beta=2,gamma=3,temperature=4", "logits", dist),
    ("mlkd", "", "logits", mlkd),
    ("mlkd", "compat=1", "logits", mlkd),
    ("mlkd", "temperature=1,standardize=1", "logits", mlkd),
    ("ctkd", "", "logits+temperature", ctkd),
    ("ctkd", "reversal=0.3", "logits+temperatures", ctkd),
    ("kd_mean", "", "teachers", kd_mean),
    ("kd_sum", "temperature=2", "teachers", kd_sum),
    ("ca_mkd", "", "teachers+labels", ca_mkd),
    ("ca_mkd", "temperature=1", "teachers+labels", ca_mkd),
]
FIXED = ("teacher_feature", "teacher_features", "teacher_logits", "teachers_logits", "margins")


def flat(name, value):
    """{"name": array} or {"name/0": array, ...} for tuples."""
    if not isinstance(value, tuple):
        return {name: value}
    return {k: v for i, entry in enumerate(value) for k, v in flat(f"{name}/{i}", entry).items()}


def tensors(name, value, learns):
    if isinstance(value, tuple):
        return tuple(tensors(name, entry, learns) for entry in value)
    tensor = torch.tensor(value)
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.double().requires_grad_(learns)


def gradients(value):
    if isinstance(value, tuple):
        return tuple(map(gradients, value))
    return value.grad.numpy()


def main():
    arrays = {}
    for inputs, given in INPUTS.items():
        for name, value in given.items():
            arrays |= flat(f"{inputs}/{name}", value)
    for loss, hyper, inputs, function in CASES:
        given = {k: v for part in inputs.split("+") for k, v in INPUTS[part].items()}
        args = {k: tensors(k, v, k not in FIXED) for k, v in given.items()}
        words = dict(h.split("=") for h in hyper.split(",") if h)
        keywords = {k: v if k == "mode" else float(v) for k, v in words.items()}
        if "order" in keywords:
            keywords["order"] = int(keywords["order"])
        value = function(**args, **keywords)
        value.backward()
        key = f"{loss}|{hyper}|{inputs}"
        arrays[f"{key}|value"] = value.detach().numpy()
        for name, tensor in args.items():
            if name not in (*FIXED, "labels"):
                arrays |= flat(f"{key}|{name}", gradients(tensor))
    path = Path(__file__).with_name("features.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, torch {torch.__version__}")


if __name__ == "__main__":
    main()
