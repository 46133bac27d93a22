"""Pieces that the configs share: the frame, nets, learn rows, optimizers, stages, whole schedules.

A config is data: a locked `ConfigDict` whose every field is spelled in full, so that each can be
overridden on the command line (`--config.stages.co_study.epochs=5`). No field is None:
`ml_collections` cannot override a None, so "not set" is `""` for a name and 0 for a number.

Nothing of `qkd_jax` is imported with this file; functions read the tables of losses and data sets.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import arguments


def recipe(data: str) -> Any:
    """Returns the recipe of a data set: `batch_size`, `epochs`, `augment` and `train_examples`."""
    from qkd_jax.data import recipe_of

    return recipe_of(data)


def begin(arg: str | None, **defaults: Any) -> tuple[ConfigDict, ConfigDict]:
    """Returns the arguments of a config, and the config with its `frame`.

    Every config takes `data`, `seed`, `train_examples` (-1: the recipe's number, 0: all) and
    `epochs` (0: the recipe's).

    Args:
        arg: the text behind the colon of `--config=file.py:text`.
        **defaults: the config's own arguments with their defaults, or other defaults of those.
    """
    shared: dict[str, Any] = dict(data="digits", seed=0, train_examples=-1, epochs=0.0)
    args = arguments.parse(arg, **{**shared, **defaults})
    config = frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    return args, config


def frame(*, data: str, seed: int, train_examples: int = -1) -> ConfigDict:
    """Returns the part that every experiment has; the config adds `nets`, `stages`, `schedule`.

    Args:
        data: a name in `qkd_jax.data.DATASETS`.
        seed: the root seed: initial weights, the order of the data, augmentation, the subset drawn.
        train_examples: labelled images to train on; 0 is all, -1 the recipe's number.
    """
    known = recipe(data)
    config = ConfigDict(dict(seed=seed))
    config.target = ""  # the engine that will run the nets, a key of qkd_jax/quantize/targets.py
    config.data = dict(
        name=data,
        dir="",  # "": TFDS_DATA_DIR or TFDS's own default
        train_examples=known.train_examples if train_examples < 0 else train_examples,
        augment=known.augment,
        tree="",  # "": the data set's own class tree, if it has one; "none": without
        image_size=0,  # of a streamed set, in pixels; 0: its own
        decoder="pillow",  # of a streamed set; "turbo" needs `pip install qkd_jax[input]`
        workers=0,  # processes that make the batches; 0: threads of this one
    )
    config.nets = {}
    config.stages = {}
    config.schedule = ()
    config.eval_batch_size = 500
    # 0 switches a periodic action off. Steps are counted within a stage.
    config.log = dict(every_steps=10, eval_every_steps=100, quant_every_steps=20)
    config.log.update(codes_every_steps=0, live=())  # live=("ranges", "agreement", ...)
    config.track = dict(trackers=(), project="qkd_jax")  # "tensorboard", "wandb"
    config.checkpoint = dict(every_seconds=30.0, every_steps=0)
    # devices=0: all. `model` of them divide the nets, by `rules` (qkd_jax/training/mesh.py).
    config.parallel = dict(mode="jit", devices=0, model=1, rules=())
    return config


def finish(
    config: ConfigDict, stages: Mapping[str, Any], *, unscheduled: Collection[str] = ()
) -> ConfigDict:
    """Adds the stages to a config, schedules them in this order, locks it and returns it.

    Args:
        config: of `begin`, with its nets.
        stages: {name: fields}, in the order in which they run.
        unscheduled: names of stages that are defined and do not run.
    """
    for name, fields in stages.items():
        config.stages[name] = fields
    config.schedule = tuple(name for name in stages if name not in unscheduled)
    return config.lock()


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
            quantizers where model and rules are the same, else its weights alone); a net of another
            run ("<run folder>#<net>"), or a file of `qkd_jax.weights` (.safetensors of torchvision,
            timm, Hugging Face, RepDistiller or ours, .npz, an Orbax folder), of which the weights
            are taken and not the quantizers, so calibrate it; "" starts from random weights.
        head_from: another net, in whose classifier this one ends, behind a projector to its
            features (SimKD); it is copied when this net first takes part. Freeze it:
            `sgd(freeze=("head",))`.
        reduce_range: 7 bits for 8-bit weights, for x86 engines without VNNI.
        fresh: regular expression for the paths of layers that do not come from `init_from` but
            start from random weights, such as "head" for another task.
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


def distil(source: str, args: ConfigDict) -> dict[str, Any]:
    """Returns the rows of (1 - w) CE + w KD: w = `args.kd_weight`, T = `args.temperature`."""
    kd_row = kd(source, args.kd_weight, temperature=args.temperature)
    return dict(ce=ce(1.0 - args.kd_weight), kd=kd_row)


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

    `decay` is schedule "wsd"'s, `layer_*` are rates by layer, `ema*` an average of the net, `rms`
    and `adam_layers` Muon's: see docs/running.md, and `optimizers` for Lion and Muon.
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
        decay=0.2,
        decay_shape="1-sqrt",
        clip_norm=0.0,
        freeze=(),
        rms=0.2,
        adam_layers=("head",),
        stacked_layers=(),
        layer_decay=1.0,
        layer_stem=("stem.*", ".*embed.*", "positions", "token.*", "registers"),
        layer_rates=(),
        ema=0.0,
        ema_warmup=False,
        ema_final=True,
        continues=continues,
    )
    return filled("optimizer", defaults, fields)


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
    return filled("hygiene", HYGIENE, fields)


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
    hygiene: dict[str, Any] | None = None,
    augment: tuple[str, ...] = (),
    views: int = 0,
    images: str = "",
    stale: int = 0,
    accumulate: int = 1,
    remat: str = "none",
    compute: str = "",
) -> dict[str, Any]:
    """Returns a `train` stage. `steps` above 0 decides its length instead of `epochs`.

    Args:
        learn: {net: {label: row}}, who learns what from whom; rows are those of `ce`, `kd`, `term`.
        optim: {net: of `sgd`}.
        epochs: passes over the training images.
        batch_size: examples a step.
        hygiene: {net: of the function `hygiene`}; a net that is left out has it all off.
        augment: replaces the data's own augmentations.
        views: 0 augments at every step; V above 0 draws V fixed views of every image (1: the images
            as they are).
        images: a stage that makes images, which replace the training split.
        stale: nets that learn teach one another through copies that are refreshed every so many
            steps; 0 for the nets as they are.
        accumulate: micro-batches in which a batch is processed for one update, to save memory.
        remat: what nets that learn keep for the backward pass: "none" all of it, "products" the
            outputs of products, "blocks" those of the net's blocks; the rest is computed again.
        compute: "bfloat16" for activations of that type, on parameters and codes of float32; "" for
            the nets' own.
    """
    return dict(
        kind="train",
        epochs=float(epochs),
        steps=0,
        batch_size=batch_size,
        # Copies: a ConfigDict turns one dict in two places into one field, overridden together.
        learn={n: {label: dict(row) for label, row in t.items()} for n, t in learn.items()},
        optim=optim,
        augment=augment,
        views=views,
        images=images,
        stale=stale,
        accumulate=accumulate,
        remat=remat,
        compute=compute,
        hygiene={**{net: dict(HYGIENE) for net in learn}, **(hygiene or {})},
    )


def train_by_recipe(
    args: ConfigDict,
    learn: dict[str, Any],
    *,
    bits: str = "float",
    share: float = 1.0,
    freeze: tuple[str, ...] = (),
    continues: str = "",
    **fields: Any,
) -> dict[str, Any]:
    """Returns the `train` stage of nets that descend together, of the sizes of the data's recipe.

    Args:
        args: with `data`, and `epochs` (0 for the recipe's).
        learn: of `train`.
        bits: the nets' rules preset; it decides their rates.
        share: of those epochs.
        freeze: of `sgd`, as `continues` is.
        continues: see there.
        **fields: of `train`.
    """
    known = recipe(args.data)
    return train(
        learn=learn,
        epochs=share * (args.epochs or known.epochs),
        batch_size=known.batch_size,
        **descent(*learn, bits=bits, freeze=freeze, continues=continues),
        **fields,
    )


def cache(*, top_k: int = 0) -> dict[str, Any]:
    """Returns the `cache` of a train stage with `views`: its frozen teachers' logits, read.

    `top_k` logits are kept of each view; 0 keeps all. The mass of the others is spread evenly over
    them, which a temperature above 1 makes heavier than it was: keep all where classes are few.
    """
    return dict(top_k=top_k, dir="")


def calibrate(
    *nets: str,
    observer: str = "",
    operands: tuple[str, ...] = (),
    images: str = "",
    examples: int = 256,
) -> dict[str, Any]:
    """Returns a `calibrate` stage.

    Args:
        *nets: those whose quantizers get their parameters.
        observer: a name in `qkd_jax.OBSERVERS`; "" leaves the choice to each spec. Its options are
            texts, `observer_options=("power:2.4",)` for "mse".
        operands: "weight", "input", "other", "output"; those that are not named keep their
            quantizers as they are. Empty means all.
        images: a stage that makes images; "" is the training split.
        examples: how many images; 0 for all.
    """
    return dict(
        kind="calibrate",
        nets=nets,
        examples=examples,
        observer=observer,
        observer_options=(),
        operands=operands,
        images=images,
    )


def post_training(kind: str, *nets: str, **fields: Any) -> dict[str, Any]:
    """Returns the stage of a post-training method, a name in `qkd_jax.ptq`.

    Fields are `examples`, `images` and the keyword arguments of the method.
    """
    return dict(kind=kind, nets=nets, **fields)


def filled(what: str, defaults: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `defaults` with the fields given in their place; unknown ones are refused."""
    unknown = set(fields) - set(defaults)
    if unknown:
        raise ValueError(f"unknown {what} fields {sorted(unknown)}; {sorted(defaults)}")
    return {**defaults, **fields}


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
    # A ConfigDict sorts its keys; `nets` holds the order of the rows.
    return dict(
        kind="evaluate", nets=tuple(methods), methods=methods, reference=reference, ensembles={}
    )


def deploy(net: str) -> dict[str, Any]:
    """Returns a `deploy` stage: integers, ONNX, agreement and latency of one net."""
    return dict(kind="deploy", nets=(net,), latency_batches=(1, 64), latency_rounds=100, target="")
