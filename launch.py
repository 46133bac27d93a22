"""Runs an experiment: flags in, one call out.

python launch.py --config=configs/qkd.py[:k=v,k=v] --workdir=DIR [--config.x.y=value]
python launch.py --config=configs/qkd.py --mode=inspect
python launch.py --workdir=DIR --mode=eval|export|report
python launch.py --config=configs/qkd.py:seeds=8 --sweep --workdir=DIR [--jobs=2]
python launch.py --config=configs/qkd.py:seeds=8 --sweep_index=$SLURM_ARRAY_TASK_ID --workdir=DIR
python launch.py --workdir=DIR --mode=export --target=onnxruntime-x86   # of quantize/targets.py
python launch.py --workdir=RUNS --mode=report --against=CONTROL   # compares the runs in a folder
srun python launch.py --config=configs/qkd.py --workdir=DIR   # or GKE, TPU pods, Open MPI
python launch.py ... --coordinator=HOST:PORT --processes=2 --process=0   # and 1 in another shell

Exit codes: 0 done; 2 a mistake in the flags or the config; 3 a loss or gradient that is not
finite; 71 out of memory; 74 a file or folder that cannot be written or read; 75 stopped by SIGTERM
or SIGINT after saving, or another process of the run has died or not come. After 71, 74 and 75 the
same command resumes the run. A sweep has the code of its runs that failed, 1 where they have
several or ended by a signal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

# XLA:CPU writes two screens of errors for each program that it reads from its cache, about features
# that it has set itself. Fatal ones still show. It must be set before jax starts.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Heavy imports come after the flags are parsed: `--help` must answer at once.

MODES = ("run", "eval", "inspect", "export", "report")
USAGE_ERROR = 2
NO_FILE = "--config names a file that is not there; it is one of configs/*.py."

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
flags.DEFINE_bool(
    "sweep",
    False,
    "Run every run of the config's get_sweep, each in <workdir>/<name>; with --mode=inspect, list "
    "them. The same command resumes.",
)
flags.DEFINE_integer("jobs", 1, "With --sweep: how many runs at a time.")
flags.DEFINE_integer("sweep_index", None, "Run this one of the config's get_sweep alone: 0, 1, ...")
flags.DEFINE_string(
    "coordinator",
    "",
    "A run of several processes: host:port of process 0, the port free there. Slurm, GKE, Cloud "
    "TPU and Open MPI need none of these three; the others may set JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID instead.",
)
flags.DEFINE_integer("processes", None, "How many processes the run has.")
flags.DEFINE_integer("process", None, "Which of them this is: 0, 1, ...")
flags.DEFINE_float("start_timeout", 300.0, "Seconds until all processes of a run must have come.")
flags.DEFINE_float("peer_timeout", 60.0, "Seconds without a word after which a process is dead.")
flags.DEFINE_string(
    "profile_steps",
    "",
    "a,b: write a trace of the steps a to b (counted from 1 over the whole schedule) to "
    "<workdir>/profile.",
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error in the flags or the config.")


class UsageError(ValueError):
    """A mistake on the command line."""


def parse_flags(argv: list[str], values: flags.FlagValues = FLAGS) -> ConfigDict | None:
    """Parses the command line and returns the config; mistakes name the nearest valid choice."""
    try:
        rest = values(argv)
        config = values["config"].value
        if config is not None:
            config.keys()  # a file that cannot be found is reported at the first use
    except (AttributeError, KeyError) as error:  # ml_collections' answer to an unknown field
        raise UsageError(_explain_override(argv) or f"--config: {error}") from error
    except OSError as error:
        raise UsageError(NO_FILE) from error
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


def wants_sweep(argv: list[str]) -> bool:
    """Returns whether a command line is a sweep's; `--sweep=false` is not."""
    given = [word.lstrip("-").partition("=") for word in argv[1:] if word.startswith("-")]
    return any(
        name == "sweep_index" or (name == "sweep" and value.lower() not in ("false", "f", "0"))
        for name, _, value in given
    )


def split_sweep(argv: list[str]) -> tuple[list[str], str, dict[str, str]]:
    """Returns the command line without its config, the text of --config, and the overrides."""
    rest, given, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and (name == "config" or name.startswith("config.")):
            given.append((name, value if equals else next(words, "")))
        else:
            rest.append(word)
    text = dict(given).get("config", "")
    return rest, text, {name: value for name, value in given if name != "config"}


def config_of(text: str, fields: Mapping[str, str]) -> ConfigDict:
    """Returns the config of --config=<text> with overrides, as its own command line would."""
    argv = ["launch.py", f"--config={text}", *(f"--{k}={v}" for k, v in fields.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    config = parse_flags(argv, values)
    assert config is not None
    return config


def sweep_of(text: str) -> tuple[object, Collection[str]]:
    """Returns (what get_sweep of a config file returns, the arguments that are its own)."""
    import runpy

    path, _, arguments = text.partition(":")
    if not os.path.exists(path):
        raise UsageError(NO_FILE)
    try:
        names = runpy.run_path(path)
        if "get_sweep" not in names:
            raise UsageError(
                f"{path} has no get_sweep(arg), which returns the runs of a sweep as a list of "
                "(name, overrides); see docs/running.md."
            )
        return names["get_sweep"](arguments), tuple(names.get("SWEEP", ()))
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # as in get_config: a mistake in the file
        raise UsageError(
            f"{path}: {type(error).__name__}: {error}; --debug shows where."
        ) from error


def sweep(argv: list[str]) -> int:
    """Runs, or with --mode=inspect lists, the runs of a config's get_sweep."""
    rest, text, fields = split_sweep(argv)
    parse_flags(rest)
    if FLAGS.sweep_index is not None and FLAGS["jobs"].present:
        raise UsageError(
            "--jobs goes with --sweep, which runs all; --sweep_index is one run in this process. "
            "Drop one of them."
        )
    if FLAGS.mode not in ("run", "inspect"):
        raise UsageError(
            f"--sweep goes with --mode=run and --mode=inspect, not {FLAGS.mode}; runs that are "
            "done are compared by --mode=report --workdir=DIR."
        )
    if not text:
        raise UsageError("--sweep needs --config, for example --config=configs/qkd.py:seeds=8.")
    if FLAGS.mode == "run" and not FLAGS.workdir:
        raise UsageError("--sweep needs --workdir, for example --workdir=runs/qkd_seeds.")
    if FLAGS.profile_steps:
        raise UsageError("--profile_steps traces one run; start that one without --sweep.")
    check_company()
    found, own = sweep_of(text)
    from qkd_jax import experiment

    return experiment.sweep(
        FLAGS.mode,
        found,
        config=text,
        own=own,
        fields=fields,
        config_of=config_of,
        workdir=FLAGS.workdir,
        jobs=FLAGS.jobs,
        index=FLAGS.sweep_index,
    )


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


CLUSTER = ("coordinator", "processes", "process", "start_timeout", "peer_timeout")


def check_company() -> None:
    """Refuses flags that say nothing in this mode."""
    of_cluster = [name for name in CLUSTER if FLAGS[name].present]
    if of_cluster and (FLAGS.mode != "run" or FLAGS.sweep or FLAGS.sweep_index is not None):
        raise UsageError(
            f"--{of_cluster[0]} goes with --mode=run of one run: it is for a run of several "
            "processes, and all else is done by one."
        )
    if FLAGS.target and FLAGS.mode != "export":
        raise UsageError(
            f"--target goes with --mode=export, not {FLAGS.mode}; a run takes its target from "
            "the config: --config.target=..."
        )
    if FLAGS.profile_steps and FLAGS.mode != "run":
        raise UsageError(
            f"--profile_steps goes with --mode=run, not {FLAGS.mode}: it traces steps of training."
        )
    if FLAGS.against and FLAGS.mode != "report":
        raise UsageError(
            f"--against goes with --mode=report, not {FLAGS.mode}: it names the control of a "
            "comparison."
        )


def main(argv: list[str]) -> int:
    """Parses the flags, calls the experiment, returns the exit code."""
    if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
        print(__doc__)
        print(FLAGS.module_help(sys.modules[__name__]))
        return 0
    try:
        if wants_sweep(argv):  # whose --config is no config's alone
            return sweep(argv)
        config = parse_flags(argv)
        if FLAGS.mode in ("run", "inspect") and config is None:
            raise UsageError(
                f"--mode={FLAGS.mode} needs --config, for example --config=configs/qkd.py."
            )
        if FLAGS.mode != "inspect" and not FLAGS.workdir:
            raise UsageError(
                f"--mode={FLAGS.mode} needs --workdir, for example --workdir=runs/qkd_digits."
            )
        check_company()
        if FLAGS["jobs"].present:
            raise UsageError("--jobs goes with --sweep: it says how many of its runs go at a time.")
        from qkd_jax import experiment

        return experiment.main(
            FLAGS.mode,
            config=config,
            workdir=FLAGS.workdir,
            target=FLAGS.target,
            against=FLAGS.against,
            cluster={name: FLAGS[name].value for name in CLUSTER},
            profile_steps=FLAGS.profile_steps,
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
