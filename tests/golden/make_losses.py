"""Writes losses.npz: values and student gradients of the response losses, by PyTorch in float64.

Every loss is restated with torch.nn.functional; gradients come from torch's autograd. The inputs
are float32 arrays made by closed formulas, stored beside the results.

    pip install torch==2.14.1 numpy && python tests/golden/make_losses.py

The test suite reads the file and does not need PyTorch.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def waves(shape, k):
    """The golden inputs: 1.5 sin(0.7 i + k) + cos(0.013 i^2 + 2 k) over the flat index i."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return np.float32(1.5 * np.sin(0.7 * i + k) + np.cos(0.013 * i**2 + 2 * k)).reshape(shape)


INPUTS = {
    "golden": (waves((8, 10), 1), waves((8, 10), 2), (3 * np.arange(8)) % 10),
    "wide": (20 * waves((4, 7), 3), 20 * waves((4, 7), 4), np.array([6, 0, 3, 3])),
    "binary": (5 * waves((1, 2), 5), 5 * waves((1, 2), 6), np.array([1])),
}


def ce(label_smoothing):
    def loss(student, teacher, labels):
        return F.cross_entropy(student, labels, label_smoothing=label_smoothing, reduction="none")

    return loss


def kd(temperature):
    def loss(student, teacher, labels):
        divergence = F.kl_div(
            F.log_softmax(student / temperature, dim=-1),
            F.softmax(teacher / temperature, dim=-1),
            reduction="none",
        )
        return temperature**2 * divergence.sum(-1)

    return loss


def logit_regression(student, teacher, labels):
    return 0.5 * F.mse_loss(student, teacher, reduction="none").sum(-1)


def standardized(z):
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)


def lskd(temperature):
    def loss(student, teacher, labels):
        return kd(temperature)(standardized(student), standardized(teacher), labels)

    return loss


def hard_target(student, teacher, labels):
    return F.cross_entropy(student, teacher.argmax(-1), reduction="none")


def others(z, labels):
    """The logits without the labelled one, [batch, classes - 1]."""
    return torch.stack(
        [torch.cat([row[:y], row[y + 1 :]]) for row, y in zip(z, labels, strict=True)]
    )


def dkd(alpha, beta, temperature, standardize=False):
    def loss(student, teacher, labels):
        if standardize:
            student, teacher = standardized(student), standardized(teacher)

        def pair(z):
            own = F.softmax(z / temperature, dim=-1).gather(1, labels[:, None])
            return torch.cat([own, 1 - own], dim=-1)

        def divergence(p, q):
            return (p * (p.log() - q.log())).sum(-1)

        target = divergence(pair(teacher), pair(student))
        rest = divergence(
            F.softmax(others(teacher, labels) / temperature, dim=-1),
            F.softmax(others(student, labels) / temperature, dim=-1),
        )
        return temperature**2 * (alpha * target + beta * rest)

    return loss


def nkd(gamma, temperature):
    def loss(student, teacher, labels):
        own_t = F.softmax(teacher, dim=-1).gather(1, labels[:, None])[:, 0]
        own_s = F.log_softmax(student, dim=-1).gather(1, labels[:, None])[:, 0]
        q_t = F.softmax(others(teacher, labels) / temperature, dim=-1)
        q_s = F.log_softmax(others(student, labels) / temperature, dim=-1)
        return -own_t * own_s - gamma * temperature**2 * (q_t * q_s).sum(-1)

    return loss


def tf_kd(correct, temperature):
    def loss(student, teacher, labels):
        share = torch.full_like(student, (1 - correct) / (student.shape[1] - 1))
        share = share.scatter(1, labels[:, None], correct)
        soft = F.softmax(share / temperature, dim=-1)
        return F.kl_div(F.log_softmax(student, dim=-1), soft, reduction="none").sum(-1)

    return loss


def apprentice(beta, gamma):
    def loss(student, teacher, labels):
        hard = F.cross_entropy(student, labels, reduction="none")
        soft = F.cross_entropy(student, F.softmax(teacher, dim=-1), reduction="none")
        return beta * hard + gamma * soft

    return loss


# Result keys are "<loss>|<hyper-parameter>=<value>|<inputs>|value" (or "gradient"); the test
# parses them and calls the loss of that name.
CASES = {
    "ce|": ce(0.0),
    "ce|label_smoothing=0.1": ce(0.1),
    "kd|": kd(4.0),
    "kd|temperature=1": kd(1.0),
    "kd|temperature=2": kd(2.0),
    "logit_regression|": logit_regression,
    "dml|": kd(1.0),
    "hard_target|": hard_target,
    "lskd|": lskd(2.0),
    "lskd|temperature=4": lskd(4.0),
    "dkd|": dkd(1.0, 8.0, 4.0),
    "dkd|alpha=2,beta=0.5,temperature=1": dkd(2.0, 0.5, 1.0),
    "dkd|standardize=1": dkd(1.0, 8.0, 4.0, standardize=True),
    "nkd|": nkd(1.5, 1.0),
    "nkd|gamma=3.5,temperature=3": nkd(3.5, 3.0),
    "tf_kd|": tf_kd(0.99, 20.0),
    "tf_kd|correct=0.9,temperature=1": tf_kd(0.9, 1.0),
    "sqakd|": kd(4.0),
    "apprentice|": apprentice(0.5, 0.5),
    "apprentice|beta=2,gamma=0": apprentice(2.0, 0.0),
}


def main():
    arrays = {}
    for name, (student, teacher, labels) in INPUTS.items():
        arrays |= {
            f"{name}|student_logits": student,
            f"{name}|teacher_logits": teacher,
            f"{name}|labels": labels.astype(np.int32),
        }
        for case, loss in CASES.items():
            z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
            target = torch.tensor(teacher, dtype=torch.float64)
            value = loss(z, target, torch.tensor(labels, dtype=torch.int64))
            value.sum().backward()
            arrays[f"{case}|{name}|value"] = value.detach().numpy()
            arrays[f"{case}|{name}|gradient"] = z.grad.numpy()
    path = Path(__file__).with_name("losses.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, torch {torch.__version__}")


if __name__ == "__main__":
    main()
