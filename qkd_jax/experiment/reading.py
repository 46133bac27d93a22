"""Reading an experiment: its data loaded, its config checked completely, before anything runs."""

from typing import Any

from qkd_jax import checks, data, weights
from qkd_jax.data import DATASETS, NotPreparedError
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.distillation.taps import DataShape
from qkd_jax.experiment.hygiene_checks import check_hygiene
from qkd_jax.experiment.run_state import without_fresh
from qkd_jax.experiment.settings import Settings, build_settings, resolve, shapes
from qkd_jax.experiment.stages import STAGES

# What `inspect` assumes of a training split that is not on this machine.
UNKNOWN_EXAMPLES = 50_000


def load_data(config: dict[str, Any]) -> data.Dataset:
    """Loads the data set of a resolved config."""
    fields = config["data"]
    return data.load(
        fields["name"],
        data_dir=fields["dir"] or None,
        train_examples=fields["train_examples"] or None,
        seed=config["seed"],
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
    source = DATASETS[name]
    examples = _examples(plain) if dataset is None else len(dataset.train_images)
    shape = DataShape(source.image_shape, examples)
    settings = build_settings(plain, STAGES, data=shape, classes=source.num_classes)
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


def _examples(config: dict[str, Any]) -> int:
    """Size of the training split."""
    try:
        return len(load_data(config).train_images)
    except NotPreparedError:
        return config["data"]["train_examples"] or UNKNOWN_EXAMPLES


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
                without_fresh(name, wanted, weights.load(init_from), fields.get("fresh", ""))
            except ValueError as error:
                raise ValueError(f"nets.{name}.init_from: {error}") from error
