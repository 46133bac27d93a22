"""Runs an experiment: flags in, one call out.

python launch.py --config=configs/qkd.py[:k=v,k=v] --workdir=DIR [--config.x.y=value]
python launch.py --config=configs/qkd.py --mode=inspect
python launch.py --workdir=DIR --mode=eval|export|report
python launch.py --workdir=DIR --mode=export --target=onnxruntime-x86   # of quantize/targets.py
python launch.py --workdir=RUNS --mode=report --against=CONTROL   # compares the runs in a folder

Exit codes: 0 done; 2 a mistake in the flags or the config; 3 a loss or gradient that is not
finite; 71 out of memory; 74 a file or folder that cannot be written or read; 75 stopped by SIGTERM
or SIGINT after saving. After 71, 74 and 75 the same command resumes the run.
"""

from __future__ import annotations

import os
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

# XLA:CPU writes two screens of errors for each program that it reads from its cache, about features
# that it has set itself. Fatal ones still show. It must be set before jax starts.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Heavy imports come after the flags are parsed: `--help` must answer at once.

MODES = ("run", "eval", "inspect", "export", "report")
USAGE_ERROR = 2

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/<file>.py, with arguments as configs/<file>.py:k=v,k=v"
)
flags.DEFINE_string("workdir", "", "The run folder: the record of the run, and where it resumes.")
flags.DEFINE_enum(
    "mode",
    "run",
    MODES,
    "run: train, or resume an interrupted run. inspect: print the schedule and every net's "
    "layers, computing nothing. eval, export, report: from a run folder alone; report of a folder "
    "of runs compares them.",
)
flags.DEFINE_string(
    "target", "", "With --mode=export: the engine that the files are for (quantize/targets.py)."
)
flags.DEFINE_string(
    "against",
    "",
    "With --mode=report of a folder of runs: the control, an arm, a method or net/method.",
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error in the flags or the config.")


class UsageError(ValueError):
    """A mistake on the command line."""


def parse_flags(argv: list[str]) -> ConfigDict | None:
    """Parses the command line and returns the config; mistakes name the nearest valid choice."""
    try:
        rest = FLAGS(argv)
        config = FLAGS["config"].value
        if config is not None:
            config.keys()  # a file that cannot be found is reported at the first use
    except (AttributeError, KeyError) as error:  # ml_collections' answer to an unknown field
        raise UsageError(_explain_override(argv) or f"--config: {error}") from error
    except OSError as error:
        raise UsageError(
            "--config names a file that is not there; it is one of configs/*.py."
        ) from error
    except flags.IllegalFlagValueError as error:
        # A ValueError of get_config arrives as a traceback in text: its last line is the message.
        raise UsageError(
            str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        ) from error
    if len(rest) > 1:
        raise UsageError(
            f"unexpected argument {rest[1]!r}; every option is --name=value, and a value that "
            "contains commas or spaces needs quotes: --config.schedule=\"('a', 'b')\"."
        )
    return config


def _explain_override(argv: list[str]) -> str:
    """Finds the override that names no field and says which field is meant."""
    import difflib
    import runpy

    given = [a.lstrip("-").partition("=")[::2] for a in argv[1:] if a.startswith("-")]
    file = [value for name, value in given if name == "config"] or [""]
    file = file[0] or argv[argv.index("--config") + 1]
    path, _, arg = file.partition(":")
    config = runpy.run_path(path)["get_config"](arg)
    for override in (name for name, _ in given if name.startswith("config.")):
        node, walked = config, "config"
        for key in override.split(".")[1:]:
            names = list(node.keys()) if hasattr(node, "keys") else []
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                has = f"it has {', '.join(names)}" if names else "it holds no fields"
                return f"--{override}: {walked} has no field {key!r}; {has}.{hint}"
            node, walked = node[key], f"{walked}.{key}"
    return ""


def main(argv: list[str]) -> int:
    """Parses the flags, calls the experiment, returns the exit code."""
    if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
        print(__doc__)
        print(FLAGS.module_help(sys.modules[__name__]))
        return 0
    try:
        config = parse_flags(argv)
        if FLAGS.mode in ("run", "inspect") and config is None:
            raise UsageError(
                f"--mode={FLAGS.mode} needs --config, for example --config=configs/qkd.py."
            )
        if FLAGS.mode != "inspect" and not FLAGS.workdir:
            raise UsageError(
                f"--mode={FLAGS.mode} needs --workdir, for example --workdir=runs/qkd_digits."
            )
        if FLAGS.target and FLAGS.mode != "export":
            raise UsageError(
                f"--target goes with --mode=export, not {FLAGS.mode}; a run takes its target from "
                "the config: --config.target=..."
            )
        if FLAGS.against and FLAGS.mode != "report":
            raise UsageError(
                f"--against goes with --mode=report, not {FLAGS.mode}: it names the control of a "
                "comparison."
            )
        from qkd_jax import experiment

        return experiment.main(
            FLAGS.mode,
            config=config,
            workdir=FLAGS.workdir,
            target=FLAGS.target,
            against=FLAGS.against,
        )
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (flags.Error, ValueError) as error:
        if "debug" in FLAGS and FLAGS["debug"].value:
            raise
        # The package is there where a file of a run folder can be the cause.
        checks = sys.modules.get("qkd_jax.checks")
        print(f"error: {checks.printable(error) if checks else error}", file=sys.stderr)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv))
