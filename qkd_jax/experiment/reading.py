"""Reading an experiment: its data loaded, its config checked completely, before anything runs."""

from typing import Any

from qkd_jax import checks, data, weights
from qkd_jax.data import DATASETS, NotPreparedError
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.distillation.taps import DataShape
from qkd_jax.experiment.config_checks import check_stream
from qkd_jax.experiment.hygiene_checks import check_hygiene
from qkd_jax.experiment.run_state import without_fresh
from qkd_jax.experiment.settings import Settings, build_settings, resolve, shapes
from qkd_jax.experiment.stages import STAGES

# What `inspect` assumes of a training split that is not on this machine.
UNKNOWN_EXAMPLES = 50_000


def load_data(config: dict[str, Any]) -> data.Dataset:
    """Loads the data set of a resolved config."""
    fields = config["data"]
    if fields["name"] in DATASETS:
        check_stream(fields)
    return data.load(
        fields["name"],
        data_dir=fields["dir"] or None,
        train_examples=fields["train_examples"] or None,
        seed=config["seed"],
        image_size=fields["image_size"] or None,
        decoder=fields["decoder"],
    )


def read(config: Any, dataset: data.Dataset | None = None) -> Settings:
    """Checks a config completely and lays out its schedule.

    Args:
        config: a `ConfigDict` or dict.
        dataset: its data; without it the sizes are those that the set is known to have.

    Raises:
        ValueError: naming the field and the nearest valid choice.
    """
    plain = resolve(config)
    name = plain["data"]["name"]
    if name not in DATASETS:
        raise checks.unknown("data set in config.data.name", name, DATASETS)
    shape, classes = _sizes(plain, dataset)
    settings = build_settings(plain, STAGES, data=shape, classes=classes)
    for name, net in settings.nets.items():
        try:
            mode_arguments(net, False)
            shapes(net, settings.image_shape)
        except ValueError as error:
            raise ValueError(f"nets.{name}: {error}") from error
    for stage in settings.stages:
        checked = STAGES[stage.kind].check(settings.nets, stage)
        if stage.trains:
            check_hygiene(settings, stage, checked)
    return settings


def _sizes(config: dict[str, Any], dataset: data.Dataset | None) -> tuple[DataShape, int]:
    """Shapes of the data and the number of classes; of data that are not here, those expected."""
    try:
        dataset = dataset or load_data(config)
    except NotPreparedError:
        source, fields = DATASETS[config["data"]["name"]], config["data"]
        height, width, channels = source.image_shape
        side = fields["image_size"]
        image = (side or height, side or width, channels)
        examples = fields["train_examples"] or UNKNOWN_EXAMPLES
        return DataShape(image, examples), source.num_classes
    return DataShape(dataset.image_shape, len(dataset.train_images)), dataset.num_classes


def check_sources(settings: Settings) -> None:
    """Refuses nets whose weights from outside of the run do not fit.

    A new run alone needs these files; a resumed one has the weights in its checkpoints.
    """
    for name, net in settings.nets.items():
        fields = settings["nets"][name]
        init_from = fields.get("init_from")
        if init_from and weights.is_source(init_from):
            wanted = shapes(net, settings.image_shape)
            try:
                loaded = weights.load(init_from, like=wanted)
                without_fresh(name, wanted, loaded, fields.get("fresh", ""))
            except ValueError as error:
                raise ValueError(f"nets.{name}.init_from: {error}") from error
