"""State of a loss term: adaptor parameters and memory banks.

A term is built from shapes alone: those of its taps give the adaptor, and the loss is evaluated on
shapes before anything runs. `Start` makes the first state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax import losses
from qkd_jax.distillation import adaptors
from qkd_jax.distillation.taps import DataShape, Features, features_of, resolve_taps
from qkd_jax.distillation.terms import Term, loss_inputs
from qkd_jax.hierarchy import find
from qkd_jax.quantize import QuantizedModel, quantize

# start(key, variables of the source or None, labels [examples] of the training set or None)
# -> {"params", "batch_stats", "teacher", "memory"}
Start = Callable[[jax.Array, Mapping[str, Any] | None, jax.Array | None], dict[str, Any]]
# Positional names of a loss that the step itself provides. Any other is the adaptor's.
STEP_INPUTS = (
    *("logits", "student_logits", "teacher_logits", "teachers_logits"),
    *("student_feature", "teacher_feature", "student_features", "teacher_features"),
    *("labels", "index", "memory", "key"),
)


def check_learned(where: str, term: Term, numbers: Mapping[str, Any]) -> None:
    """Refuses a new term that starts at once, though parts of its adaptor must learn before."""
    parts = losses.TABLE[term.loss].before_start
    if parts and not (term.has_schedule and numbers["start"]):
        raise ValueError(
            f"{where} starts at step 0, but parts of its adaptor ({', '.join(parts)}) learn until "
            "the start and are frozen then; give it a start, such as start=0.125, or continue a "
            "stage that has this term (optim.<net>.continues)."
        )


@dataclasses.dataclass(frozen=True)
class TermBuilder:
    """Builds what a term's state depends on from a row of the learn table and the nets' shapes.

    Attributes:
        where: the row, for messages.
        name: of the net that learns.
        loss: key of LOSSES.
        fields: the row.
        sources: names of the nets that teach.
        nets: {name: net}.
        data: shapes of the data, or None where the plan does not know them.
    """

    where: str
    name: str
    loss: str
    fields: Mapping[str, Any]
    sources: tuple[str, ...]
    nets: Mapping[str, QuantizedModel]
    data: DataShape | None

    @property
    def row(self) -> losses.Loss:
        """The loss's row of `losses.TABLE`."""
        return losses.TABLE[self.loss]

    def adaptor(self) -> tuple[tuple[str, ...], tuple[str, ...], QuantizedModel | None]:
        """Returns (taps of the net, taps of the source, the adaptor or None).

        Raises:
            ValueError: unknown taps or options, taps that a loss does not look at, or a number of
                taps that does not fit.
        """
        for field in ("taps", "teacher_taps"):
            if not self.row.has_taps and self.fields.get(field):
                raise ValueError(
                    f"{self.where}.{field} is {self.fields[field]!r}, but loss {self.loss!r} looks "
                    "at no feature; drop it."
                )
        if self.fields.get("teacher_taps") and not self.sources:
            raise ValueError(
                f"{self.where}.teacher_taps is {self.fields['teacher_taps']!r}, but loss "
                f"{self.loss!r} compares with no other net; drop it."
            )
        taps, teacher_taps = self._taps() if self.row.has_taps else ((), ())
        shapes = [
            tuple(self._features(name).shape(tap).shape[1:] for tap in chosen)
            for name, chosen in zip(
                (self.name, *self.sources[:1]), (taps, teacher_taps), strict=False
            )
        ]
        try:
            options = dict(self.fields.get("adaptor") or {})
            student, teacher = (*shapes, (), ())[:2]
            module = adaptors.build(self.loss, student, teacher, self._classes(), **options)
        except ValueError as error:
            raise ValueError(f"{self.where}.adaptor: {error}") from error
        # Only for its `apply`, which hands `axis_name` to every BatchNorm.
        return taps, teacher_taps, None if module is None else quantize(module)

    def _classes(self) -> int:
        """Returns the number of logits for a loss with classifiers; others do not need it."""
        return self._features(self.name).logits.shape[-1] if self.row.has_heads else 0

    def _features(self, name: str) -> Features:
        return features_of(self.nets[name], self._data().image)

    def _data(self) -> DataShape:
        if self.data is None:
            raise ValueError(
                f"{self.where}: loss {self.loss!r} looks at features or keeps a memory, so the "
                "plan must know the data; give plan_step data=DataShape(image, examples)."
            )
        return self.data

    def _taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        resolved = []
        single = self.row.paired and "student_features" not in self.row.inputs
        defaults = self.row.default_taps
        fields = zip(("taps", "teacher_taps"), (self.name, *self.sources), defaults, strict=False)
        for field, name, default in fields:
            wanted = self.fields.get(field) or default
            try:
                taps = resolve_taps(f"{self.where}.{field}", self._features(name), wanted)
            except ValueError as error:
                if wanted != "projected":
                    raise
                raise ValueError(
                    f"{error} A net has that tap if it ends in its teacher's classifier: "
                    f"nets.{self.name}.head_from={self.sources[0]!r}, as in "
                    "configs/feature_kd.py:loss=simkd."
                ) from None
            resolved.append(taps)
            if single and len(taps) > 1:
                raise ValueError(
                    f"{self.where}.{field} is {wanted!r}: {len(taps)} taps, but loss "
                    f"{self.loss!r} compares one feature; name one, and give others a term each."
                )
        if len(resolved) == 1:
            return resolved[0], ()
        taps, teacher_taps = resolved
        if not self.row.paired or len(taps) == len(teacher_taps):
            return taps, teacher_taps
        if self.fields.get("taps") and self.fields.get("teacher_taps"):
            raise ValueError(
                f"{self.where} has {len(taps)} taps {taps} and {len(teacher_taps)} teacher_taps "
                f"{teacher_taps}, which loss {self.loss!r} compares one by one; give as many."
            )
        # Nets of unlike depth, by the default taps: the deepest belong together.
        count = min(len(taps), len(teacher_taps))
        return taps[-count:], teacher_taps[-count:]

    def start(self, term: Term) -> Start | None:
        """Returns the function that makes the term's first state, or None if it has none."""
        if not term.has_state:
            return None

        def start(
            key: jax.Array, teacher: Mapping[str, Any] | None, labels: jax.Array | None
        ) -> dict[str, Any]:
            state: dict[str, Any] = {}
            if term.adaptor is not None:
                features = self._zeros(term)
                state = dict(term.adaptor.init(jax.random.fold_in(key, 0), *features, train=False))
                state.setdefault("params", {})
                if "teacher" in state and teacher is not None:
                    state["teacher"] = adaptors.teacher_margins(
                        state["teacher"],
                        self.nets[self.sources[0]],
                        teacher,
                        term.teacher_taps,
                        self._data().image,
                        fixed=term.adaptor.model.margin is not None,
                    )
            if self.row.memory is not None:
                first = jax.eval_shape(lambda: self._inputs(term, state)[term.inputs[0]])
                state["memory"] = self.row.memory(
                    self._data().examples,
                    first.shape[-1],
                    key=jax.random.fold_in(key, 1),
                    labels=labels,
                )
            return state

        return start

    def _zeros(self, term: Term) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Returns features of the two nets for a batch of 2."""

        def zeros(name: str, taps: tuple[str, ...]) -> tuple[jax.Array, ...]:
            shapes = [self._features(name).shape(tap) for tap in taps]
            return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)

        teacher = zeros(self.sources[0], term.teacher_taps) if self.sources else ()
        return zeros(self.name, term.taps), teacher

    def _inputs(self, term: Term, state: Mapping[str, Any], classes: int = 4) -> dict[str, Any]:
        """Returns the loss's inputs for a batch of 2."""
        logits = jnp.zeros((2, classes))
        features = self._zeros(term)
        inputs = loss_inputs(features[0], features[1], logits, (logits,) * len(self.sources))
        inputs |= {"labels": jnp.zeros(2, jnp.int32), "index": jnp.zeros(2, jnp.int32)}
        inputs |= {"key": jax.random.key(0), "memory": state.get("memory")}
        if term.adaptor is not None:
            variables = {name: tree for name, tree in state.items() if name != "memory"}
            inputs |= term.adaptor.apply(variables, *features, train=False)
        return inputs

    def attempt(self, term: Term, start: Start | None, arguments: Mapping[str, Any]) -> None:
        """Evaluates the loss on shapes, with Python numbers, so that its own checks see them.

        Raises:
            ValueError: what the loss or the adaptor says, or an input that nothing provides.
        """

        def run() -> Any:
            teacher = None
            if "margins" in term.inputs:  # made from the teacher's variables
                net, image = self.nets[self.sources[0]], self._data().image
                teacher = net.init(jax.random.key(0), jnp.zeros((1, *image), jnp.float32))
            state = {} if start is None else start(jax.random.key(0), teacher, None)
            tree = arguments.get("tree")
            # A class tree says how many classes it is for.
            classes = len(find(tree).classes) if tree else self._classes() or 4
            inputs = self._inputs(term, state, classes)
            for name in term.inputs:
                if name not in inputs:
                    raise ValueError(
                        f"loss {self.loss!r} takes {name!r}, which the step cannot give and no "
                        f"adaptor yields; the step has {', '.join(STEP_INPUTS)}."
                    )
            return self.row.function(*(inputs[n] for n in term.inputs), **arguments)

        try:
            jax.eval_shape(run)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
