"""`python -m qkd_jax.weights SOURCE TARGET`: a net's weights from one file format to another.

SOURCE is whatever a config's `init_from` takes; TARGET ends in .safetensors or .npz.
"""

import argparse
import sys
from collections.abc import Sequence

from qkd_jax import checks, weights
from qkd_jax.trees import flatten


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qkd_jax.weights", description=weights.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help=weights.FORMS)
    parser.add_argument("target", help="the file to write: .safetensors or .npz")
    parser.add_argument(
        "--layout",
        choices=weights.WRITTEN,
        default="flax",
        help='"torch": names and axes of torchvision, timm and RepDistiller ResNets',
    )
    args = parser.parse_args(arguments)
    try:
        variables = weights.load(args.source)
        weights.save(args.target, variables, layout=args.layout)
    except ValueError as error:
        print(checks.printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(f"{args.target}: {len(flatten(variables))} arrays read from {args.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
