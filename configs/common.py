"""Pieces that the configs share: optimizers, stages, and the frame around them.

A config is data: a locked `ConfigDict` whose every field is spelled in full, so that each can be
overridden on the command line (`--config.stages.co_study.epochs=5`). No field is None:
`ml_collections` cannot override a None, so "not set" is `""` for a name and 0 for a number.

Nothing here imports jax or qkd_jax: a config loads in milliseconds.
"""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict

__all__ = [
    "DATA",
    "HYGIENE",
    "cache",
    "calibrate",
    "ce",
    "cmi",
    "dafl",
    "deploy",
    "descent",
    "diagnose",
    "evaluate",
    "frame",
    "hygiene",
    "kd",
    "net",
    "pretrain",
    "recipe",
    "reestimate_bn",
    "sgd",
    "synthesize",
    "term",
    "train",
]

# What a data set brings with it: the sizes that a recipe needs. `train_examples=0` takes the whole
# training split. The digits' 300 are the few-labels case, where a teacher has something to add.
DATA: dict[str, dict[str, Any]] = {
    "digits": dict(train_examples=300, batch_size=64, epochs=100, augment=("shift:1",)),
    "synthetic": dict(train_examples=256, batch_size=32, epochs=4, augment=()),
    "mnist": dict(train_examples=0, batch_size=128, epochs=10, augment=("shift:2",)),
    "fashion_mnist": dict(
        train_examples=0, batch_size=128, epochs=10, augment=("pad_crop:2", "flip")
    ),
    "cifar10": dict(train_examples=0, batch_size=128, epochs=200, augment=("pad_crop:4", "flip")),
    "cifar100": dict(train_examples=0, batch_size=128, epochs=200, augment=("pad_crop:4", "flip")),
}


def recipe(data: str) -> dict[str, Any]:
    """Returns the sizes for a data set; one that is not listed gets CIFAR-10's."""
    return DATA.get(data, DATA["cifar10"])


def frame(*, data: str, seed: int, train_examples: int = -1) -> ConfigDict:
    """Returns the part that every experiment has; the config adds `nets`, `stages`, `schedule`.

    Args:
      data: a name in `qkd_jax.data.DATASETS`.
      seed: the root seed: initial weights, the order of the data, augmentation, the subset drawn.
      train_examples: labelled images to train on; 0 is all, -1 what `DATA` says for this set.
    """
    known = recipe(data)
    config = ConfigDict()
    config.seed = seed
    config.target = ""  # what will run the nets, a key of qkd_jax/quantize/targets.py
    config.data = dict(
        name=data,
        dir="",  # "": TFDS_DATA_DIR or TFDS's own default
        train_examples=known["train_examples"] if train_examples < 0 else train_examples,
        augment=known["augment"],
        tree="",  # "": the data set's own class tree, if it has one; "none": without
    )
    config.nets = {}
    config.stages = {}
    config.schedule = ()
    config.eval_batch_size = 500
    # 0 switches a periodic action off. Steps count inside a stage.
    config.log = dict(every_steps=10, eval_every_steps=100, quant_every_steps=20)
    config.checkpoint = dict(every_seconds=30.0, every_steps=0)
    config.parallel = dict(mode="jit", devices=0)  # devices=0: all of them
    return config


def net(
    model: str,
    *,
    width: int = 0,
    rules: str = "float",
    init_from: str = "",
    head_from: str = "",
    reduce_range: bool = False,
    fresh: str = "",
) -> dict[str, Any]:
    """Returns the fields of one network.

    Args:
      model: a name in `qkd_jax.models.MODELS`.
      width: channels of the first stage; 0 leaves the model's own default.
      rules: a preset ("float", "w2a2", "w<k>a<k>", "ternary") or a tuple of rule dicts.
      init_from: another net of this config, copied when this one first takes part (with its
        quantizers where model and rules are the same, else its weights alone); a net of another run
        ("<run folder>#<net>"), or a file of `qkd_jax.weights` (.safetensors of torchvision, timm,
        RepDistiller or ours, .npz, an Orbax folder), whose weights are taken and whose quantizers
        are not, so calibrate it; "" starts from random weights.
      head_from: another net, in whose classifier this one ends, behind a projector to its features
        (SimKD); it is copied when this net first takes part. Freeze it: `sgd(freeze=("head",))`.
      reduce_range: 7 bits for 8-bit weights, for x86 engines without VNNI.
      fresh: regular expression for the paths of layers that do not come from `init_from` but start
        from random weights, such as "head" for another task.
    """
    return dict(
        model=model,
        width=width,
        rules=rules,
        init_from=init_from,
        head_from=head_from,
        reduce_range=reduce_range,
        fresh=fresh,
    )


def ce(weight: float = 1.0, *, label_smoothing: float = 0.0) -> dict[str, Any]:
    """Returns the entry of a net that learns from labels."""
    return dict(loss="ce", weight=weight, label_smoothing=label_smoothing)


def kd(source: str, weight: float = 1.0, *, temperature: float = 2.0) -> dict[str, Any]:
    """Returns the entry of a net that learns from the logits of the net `source`."""
    return dict(loss="kd", source=source, weight=weight, temperature=temperature)


def term(
    loss: str,
    source: str | tuple[str, ...] = "",
    weight: float | dict[str, Any] = 1.0,
    *,
    taps: str | tuple[str, ...] = "",
    teacher_taps: str | tuple[str, ...] = "",
    start: float = 0.0,
    end: float = 0.0,
    warmup: float = 0.0,
    decay: float = 0.0,
    **fields: Any,
) -> dict[str, Any]:
    """Returns the entry of a net that learns by any loss.

    Args:
      loss: a name in `qkd_jax.losses.LOSSES`.
      source: the net that teaches; several for a loss of several teachers.
      weight: a number, or a ramp over the stage such as dict(begin=1.0, end=0.1, shape="cosine"),
        as every number of the loss may be.
      taps: where the loss looks in the net that learns: features or modules by name, or "last",
        "middle", "shallow", "stages", "pre"; "" leaves it to the loss.
      teacher_taps: the same for the source.
      start: from where on the term counts; steps, or below 1 a fraction of the stage.
      end: until where; 0 is the end of the stage.
      warmup: length over which its weight rises from `start` on.
      decay: length over which it falls before `end`.
      **fields: the loss's own hyper-parameters, and `adaptor`, a dict of its options.
    """
    return dict(
        loss=loss,
        source=source,
        weight=weight,
        taps=taps,
        teacher_taps=teacher_taps,
        start=start,
        end=end,
        warmup=warmup,
        decay=decay,
        **fields,
    )


def sgd(lr: float, *, weight_decay: float, continues: str = "", **fields: Any) -> dict[str, Any]:
    """Returns SGD with Nesterov momentum 0.9 and a cosine for one net of a `train` stage.

    `quant_lr` is the learning rate of what the quantizers learn; -1 follows `lr`. `warmup` and
    `milestones` count steps, or below 1 fractions of the schedule. `clip_norm=0` does not clip.
    `freeze` lists regular expressions of layers that do not learn. `continues` names the stage
    whose optimizer and schedule run on over the joint length.
    """
    defaults = dict(
        name="sgd",
        lr=lr,
        quant_lr=-1.0,
        weight_decay=weight_decay,
        momentum=0.9,
        nesterov=True,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        schedule="cosine",
        warmup=0.0,
        final=0.0,
        milestones=(),
        decay_factor=0.1,
        clip_norm=0.0,
        freeze=(),
        continues=continues,
    )
    return _filled("optimizer", defaults, fields)


# What a train stage does for low-bit nets beside descent, all of it off.
HYGIENE: dict[str, Any] = dict(
    track=False,
    momentum=0.01,
    freeze=0.0,
    freeze_end=0.0,
    dampen=0.0,
    dampen_start=0.0,
    max_ratio=0.0,
    anneal=(),
    size_bytes=0.0,
    size_weight=1.0,
)


def hygiene(**fields: Any) -> dict[str, Any]:
    """Returns the hygiene of one net in a `train` stage; what is not given stays off.

    `track` follows how often each weight's code oscillates, a moving average with `momentum`;
    `freeze` pins those above a frequency that goes to `freeze_end` (0: the same) along a cosine;
    `dampen` pulls weights to their codes, with a strength that comes from `dampen_start`;
    `max_ratio` keeps learned steps within a factor of the stage's start; `anneal` takes parameters
    of quantizers to a value at its end, ("temperature:32",); `size_bytes` with `size_weight` is the
    budget of learned bits.
    """
    return _filled("hygiene", HYGIENE, fields)


def descent(*nets: str, bits: str = "float", **fields: Any) -> dict[str, Any]:
    """Returns `optim` and `hygiene` of a stage in which nets learn: float ones, or quantized ones.

    Quantized nets start trained, at half the learning rate, and learned steps stay within a factor
    of 8 of the stage's start: an 8-bit step that falls towards 0 takes its weights along, and
    behind a BatchNorm gradients grow as they shrink (in one run of the digits the stem's step went
    from 0.02 past 0 to 15,756 within 20 steps).

    Args:
      *nets: those that learn.
      bits: their rules preset; those without learned steps have nothing to clamp.
      **fields: of `sgd`.
    """
    rates: dict[str, Any] = dict(lr=0.1, weight_decay=5e-4)
    if bits != "float":
        rates = dict(lr=0.05, weight_decay=1e-4)
    learned = re.fullmatch(r"w\d+a\d+(:(?!static|dynamic).*)?|ternary", bits)
    return dict(
        optim={net: sgd(**rates, **fields) for net in nets},
        hygiene={net: hygiene(max_ratio=8.0) for net in nets} if learned else {},
    )


def train(
    *,
    learn: dict[str, Any],
    optim: dict[str, Any],
    epochs: float,
    batch_size: int,
    augment: tuple[str, ...] = (),
    views: int = 0,
    hygiene: dict[str, Any] | None = None,
    images: str = "",
    stale: int = 0,
) -> dict[str, Any]:
    """Returns a `train` stage. `steps` above 0 decides its length instead of `epochs`.

    `augment` takes the place of the data's own augmentations. They are drawn anew at every step, or
    once for each of `views` views of every image (1: the images as they are). `images` names a
    stage that makes images, which take the place of the training split.

    With `stale` nets that learn teach one another through copies taken anew every so many steps.

    `hygiene` is {net: what the function `hygiene` returns}; a net that is left out has it all off.
    """
    return dict(
        kind="train",
        epochs=float(epochs),
        steps=0,
        batch_size=batch_size,
        learn=learn,
        optim=optim,
        augment=augment,
        views=views,
        images=images,
        stale=stale,
        hygiene={**{net: dict(HYGIENE) for net in learn}, **(hygiene or {})},
    )


def pretrain(net: str, *, data: str, epochs: float = 0.0) -> dict[str, Any]:
    """Returns the `train` stage of a float net; epochs 0 takes those of the recipe."""
    known = recipe(data)
    return train(
        learn={net: dict(ce=ce())},
        epochs=epochs or known["epochs"],
        batch_size=known["batch_size"],
        **descent(net),
    )


def cache(*, top_k: int = 0) -> dict[str, Any]:
    """Returns the `cache` of a train stage with `views`: its frozen teachers' logits, read.

    `top_k` logits are kept of each view; 0 keeps all. The mass of the others is spread evenly over
    them, which a temperature above 1 makes heavier than it was: keep all where classes are few.
    """
    return dict(top_k=top_k, dir="")


def calibrate(
    *nets: str, operands: tuple[str, ...] = (), images: str = "", examples: int = 256
) -> dict[str, Any]:
    """Returns a `calibrate` stage; `observer=""` leaves the choice to each spec.

    Options of an observer are texts, observer_options=("power:2.4",) for "mse".
    `operands` ("weight", "input", "other", "output") calibrates some and keeps the others; empty
    means all. `images` names a stage that makes images; "" is the training split.
    """
    return dict(
        kind="calibrate",
        nets=nets,
        examples=examples,
        observer="",
        observer_options=(),
        operands=operands,
        images=images,
    )


def synthesize(
    net: str,
    *,
    examples: int,
    method: str = "deep_inversion",
    steps: int = 0,
    lr: float = 0.0,
) -> dict[str, Any]:
    """Returns a `synthesize` stage: images made from a trained net with BatchNorm.

    `method` is "deep_inversion" or "zeroq"; `steps=0` and `lr=0.0` are the method's own.
    """
    return dict(
        kind="synthesize",
        nets=(net,),
        examples=examples,
        method=method,
        batch_size=256,
        steps=steps,
        lr=lr,
        bn_weight=10.0,
        tv_weight=2.5e-5,
        l2_weight=0.0,
        jitter=2,
    )


def dafl(net: str, *, examples: int, **fields: Any) -> dict[str, Any]:
    """Returns a `dafl` stage: images by a generator that a trained net's answers teach."""
    defaults = dict(
        batch_size=256,
        steps=2000,
        lr=0.02,
        latent=100,
        width=64,
        one_hot_weight=1.0,
        activation_weight=0.1,
        entropy_weight=5.0,
        tap="pooled",
    )
    own = dict(kind="dafl", nets=(net,), examples=examples)
    return {**own, **_filled("dafl", defaults, fields)}


def cmi(net: str, student: str = "", *, examples: int, **fields: Any) -> dict[str, Any]:
    """Returns a `cmi` stage: images by generators that contrast each batch with those before it.

    `student` is the net whose copy they are adversary to; "" leaves that term out.
    """
    defaults = dict(
        batch_size=256,
        steps=200,
        lr=1e-3,
        latent=256,
        width=64,
        bn_weight=1.0,
        one_hot_weight=1.0,
        contrast_weight=0.8,
        adversarial_weight=0.5,
        temperature=0.1,
        embedding=256,
        memory=4096,
        shift=4,
        flip=False,
        smallest_crop=0.25,
        student_steps=400,
        student_lr=0.1,
        student_temperature=20.0,
    )
    nets = (net, student) if student else (net,)
    return {**dict(kind="cmi", nets=nets, examples=examples), **_filled("cmi", defaults, fields)}


def _filled(what: str, defaults: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    unknown = set(fields) - set(defaults)
    if unknown:
        raise ValueError(f"unknown {what} fields {sorted(unknown)}; {sorted(defaults)}")
    return {**defaults, **fields}


def beside_labels(config: ConfigDict, args: ConfigDict, method: str, **term: Any) -> None:
    """Fills a config with a `student` that teaches itself by a term, and `alone` by labels.

    With `args.bits` both learn in float first, from labels, and by their methods as quantized nets.

    Args:
      config: of `frame`; its nets, stages and schedule are written.
      args: with `model`, `width`, `bits`, `data` and `epochs`.
      method: the student's, in the results.
      **term: {label: the term's row}.
    """
    known = recipe(args.data)

    def stage(name: str, bits: str, **more: Any) -> Any:
        return train(
            learn={name: dict(ce=ce(), **more)},
            epochs=args.epochs or known["epochs"],
            batch_size=known["batch_size"],
            **descent(name, bits=bits),
        )

    config.nets.alone = net(args.model, width=args.width, rules=args.bits)
    config.nets.student = net(args.model, width=args.width, rules=args.bits, init_from="alone")
    schedule = []
    if args.bits != "float":
        config.stages.start = stage("alone", "float")
        config.stages.calibrate = calibrate("alone", "student")
        schedule += ["start", "calibrate"]
    # The student first: it copies `alone` at the moment at which it first takes part.
    config.stages.distil = stage("student", args.bits, **term)
    config.stages.alone = stage("alone", args.bits)
    config.stages.evaluate = evaluate(alone="labels", student=method)
    config.schedule = (*schedule, "distil", "alone", "evaluate")


def diagnose(*nets: str) -> dict[str, Any]:
    """Returns a `diagnose` stage: range, clipping, SQNR and used codes of every operand."""
    return dict(kind="diagnose", nets=nets, examples=256)


def reestimate_bn(*nets: str) -> dict[str, Any]:
    """Returns a `reestimate_bn` stage: new running statistics, kept where they fit the training
    images better (`keep="better"`) or in any case (`keep="always"`)."""
    return dict(kind="reestimate_bn", nets=nets, keep="better")


def evaluate(reference: str = "", **methods: str) -> dict[str, Any]:
    """Returns an `evaluate` stage: `methods` names the row of the results table by net.

    `reference` is the net with which agreement is counted; "" counts none. Its `ensembles` may
    name rows for several of the nets together, as {name: nets}.
    """
    # A ConfigDict sorts its keys, so the order of the rows is said apart.
    return dict(
        kind="evaluate",
        nets=tuple(methods),
        methods=methods,
        reference=reference,
        ensembles={},
    )


def deploy(net: str) -> dict[str, Any]:
    """Returns a `deploy` stage: integers, ONNX, agreement and latency of one net."""
    return dict(kind="deploy", nets=(net,), latency_batches=(1, 64), latency_rounds=100, target="")
