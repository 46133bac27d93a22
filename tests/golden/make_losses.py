"""Writes losses.npz: values and student gradients of the response losses, by PyTorch in float64.

Every loss is restated with torch.nn.functional; gradients come from torch's autograd. The inputs
are float32 arrays made by closed formulas, stored beside the results.

    pip install torch==2.13.0 numpy && python tests/golden/make_losses.py

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
