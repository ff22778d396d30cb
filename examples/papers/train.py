# smoke: --epochs 2 --subset 256 --width 0.1 --hessian-examples 64
"""Train a classifier with any sharpness-aware method, or with one composed of parts.

From the root of the repository:

    python -m examples.papers.train                       # digits, MLP, SAM, a few seconds
    python -m examples.papers.train --method wsam --rho 0.2 --gamma 0.9 --label-noise 0.4
    python -m examples.papers.train --config mine.toml --out runs/mine
    python -m examples.papers.train --config mine.toml --out runs/mine --resume
    python -m examples.papers.train --dataset cifar10 --data-dir DIR --model resnet18 \\
        --dtype bfloat16 --augment crop flip --epochs 200 --learning-rate 0.05 \\
        --weight-decay 1e-3 --method sam --seeds 0 1 2
    python -m examples.papers.train --validation 0.1 --tune rho 0.02 0.05 0.1 0.2

A TOML file holds the same settings by the same names (``learning_rate = 0.05``), the options of a
method beside them (``rho = 0.2``), and compositions::

    method = "composition"
    surrogate = {name = "renormalized", rule = {name = "gap_descent", alpha = 0.1}}
    policy = {name = "above_gradient_norm", lambda_1 = -1.0, lambda_2 = 1.0}
    base = {name = "adamw", b2 = 0.99}
    [[perturbation]]
    name = "subtract_ema"
    sigma = 1.0
    decay = 0.9
    [[perturbation]]
    name = "steepest_ascent"
    rho = 0.1

`Run` holds what a run needs and is the place to start your own from: it starts, trains an epoch,
evaluates. `fit` adds the files: metrics (``--log csv`` or ``tensorboard``), learning curves as PNG,
a checkpoint after every epoch. A resumed run is bit-identical to one that was never stopped: every
random number is a function of the seed and the step alone.

On an accelerator an epoch is one program, a ``lax.scan`` over a data set that stays on the device.
On a CPU it is a Python loop over steps: XLA's CPU backend is tens of times slower at convolutions
inside a loop or a ``cond``, and a policy that skips the second gradient is then asked on the host.

All visible devices train together on shares of the batch (``jit`` with a sharded batch). Gradients
and batch statistics are then those of the whole batch, and so is the perturbation: to ascend along
the gradients of parts of it, m-sharpness, pass ``--groups``; it does not depend on the devices.
"""

import csv
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sam_optax import diagnostics
from sam_optax.training import esam_step, host_dispatched, ksam_step, two_gradient_step

from . import data as data_sets
from . import folder, imagenet_models, methods, models

# --- Settings -------------------------------------------------------------------------------------


_POSITIVE = ("width", "epochs", "batch_size", "groups", "microbatches")
_PARTS = ("perturbation", "surrogate", "policy")
_CHOICES = {
    "dataset": data_sets.NAMES,
    "noise_kind": ("other", "any"),
    "dtype": ("float32", "bfloat16"),
    "schedule": ("cosine", "constant"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on; the command line and TOML files use these names."""

    dataset: str = "digits"
    """Which data, one of those that `examples.papers.data` names, such as cifar10."""
    data_dir: str | None = None
    """Directory with the data set's files."""
    subset: int = 0
    """Number of training examples to use; 0: all."""
    validation: float = 0.0
    """Share of the training set held out for validation."""
    label_noise: float = 0.0
    """Share of training labels drawn anew."""
    noise_kind: str = "other"
    """From the other classes, or from any."""
    augment: tuple[str, ...] = ()
    """crop, flip, cutout; of an image-folder resized-crop."""
    image_size: int = 0
    """Side of the model's images; 0: 224 of a folder's, else their own."""
    workers: int = 0
    """Processes that read an image-folder; 0: threads."""
    cutout_size: int = 16
    """Side of the hole, in pixels."""
    standardize: bool = True
    """Pixels have mean 0 and variance 1 over the training set; else they are in [0, 1]."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    model: str = "mlp"
    """One of those that `examples.papers.models` names, such as resnet18, wrn28-10, vit-s4."""
    width: float = 1.0
    """Factor on the model's numbers of channels."""
    init_from: str = ""
    """Checkpoint to start from: .safetensors, or Orbax's directory."""
    init_without: str = ""
    """Module that starts anew, for other classes: head, fc."""
    model_ema: float = 0.0
    """Decay of an average of the model that is evaluated; 0: none."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16."""

    method: str = "sam"
    """A method of the library, base, tail, esam, ksam or composition; options by name: --rho 1."""
    options: tyro.conf.Suppress[dict] = dataclasses.field(default_factory=dict)
    # Of a composition: a table or a list of tables, a table, a table.
    perturbation: tyro.conf.Suppress[Any] = None
    surrogate: tyro.conf.Suppress[Any] = None
    policy: tyro.conf.Suppress[Any] = None
    base: str | dict = "sgd"
    """An optimizer of Optax; in TOML, a table with arguments."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 5e-4
    """On all parameters, inside the base optimizer."""
    clip_norm: float = 0.0
    """Largest norm of what the base optimizer sees; 0: none."""
    groups: int = 1
    """Parts of the batch with a perturbation of their own."""
    microbatches: int = 1
    """Parts of the batch that are computed one after the other."""

    learning_rate: float = 0.1
    """Peak."""
    schedule: str = "cosine"
    """Of the learning rate: cosine or constant."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 128
    """Examples per step; what is left over waits for the next epoch."""
    seed: int = 0
    """Of everything random."""

    hessian_examples: int = 256
    """Training examples for lambda_max; 0: not computed."""
    devices: int = 0
    """Number of devices; 0: all."""

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "Config":
        """From a dictionary; what is no field is an option of the method.

        Raises:
            ValueError: something in it is neither, or cannot be.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = {k: v for k, v in settings.items() if k in fields and k != "options"}
        options = {k: v for k, v in settings.items() if k not in fields}
        options = {**settings.get("options", {}), **options}
        if isinstance(known.get("augment"), str):
            known["augment"] = (known["augment"],)
        for name, kinds in (("augment", (list, tuple)), ("base", (str, Mapping))):
            if not isinstance(known.get(name, kinds[0]()), kinds):
                raise ValueError(f"{name} cannot be {known[name]!r}")
        for name, value in known.items():
            kind, choices = type(fields[name].default), _CHOICES.get(name)
            if kind in (bool, int, float, str) and name not in ("base", "data_dir"):
                right = isinstance(value, int | float) if kind is float else type(value) is kind
                if not right:
                    raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
            if kind is float:
                known[name] = float(value)
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if kind in (int, float) and (value < 0 or (name in _POSITIVE and not value)):
                least = "above 0" if name in _POSITIVE else "at least 0"
                raise ValueError(f"{name} must be {least}, got {value}")
        if "augment" in known:
            known["augment"] = tuple(known["augment"])
        config = cls(**known, options=options)
        methods.check_options(config.method, options)
        for name in _PARTS:
            if config.method != "composition" and getattr(config, name) is not None:
                raise ValueError(f'{name} is part of a composition; set method = "composition"')
        for name in ("groups", "microbatches"):
            if config.batch_size % getattr(config, name):
                raise ValueError(
                    f"a batch of {config.batch_size} cannot be cut into {getattr(config, name)} "
                    f"{name}; choose a divisor"
                )
        if config.microbatches > 1 and config.method in methods.STEP_OPTIONS:
            raise ValueError(f"method {config.method!r} takes no microbatches: it selects examples")
        return config

    def load(self) -> data_sets.Dataset:
        """The data set."""
        return data_sets.load(
            self.dataset,
            self.data_dir,
            subset=self.subset,
            validation=self.validation,
            label_noise=self.label_noise,
            noise_kind=self.noise_kind,
            seed=self.seed,
        )

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
        """The method around its base optimizer."""
        total = self.epochs * steps_per_epoch
        setting = methods.Setting(
            self.learning_rate_schedule(steps_per_epoch),
            self.learning_rate,
            total,
            jax.random.key(self.seed + 1),
            self.momentum,
        )
        spec = {"name": self.base} if isinstance(self.base, str) else dict(self.base)
        if spec.get("name") == "sgd":
            spec = {"momentum": self.momentum or None} | spec
        base = methods.base_optimizer(spec, setting, self.weight_decay, self.clip_norm)
        if self.method == "composition":
            return methods.composition(
                self.perturbation, self.surrogate, self.policy, base, setting
            )
        return methods.optimizer(self.method, self.options, base, setting)

    def learning_rate_schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate by step."""
        warm = round(self.warmup_epochs * steps_per_epoch)
        left = max(1, self.epochs * steps_per_epoch - warm)
        peak = self.learning_rate
        after = (
            optax.constant_schedule(peak)
            if self.schedule == "constant"
            else optax.cosine_decay_schedule(peak, left)
        )
        if not warm:
            return after
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm])


# --- A run ----------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training changes: parameters, running statistics, the optimizer's state.

    With ``model_ema``, also the running average of parameters and statistics, which is evaluated.
    """

    params: Any
    stats: Any
    opt_state: Any
    average: Any = ()


_SCALARS = (
    "loss",
    "perturbed_loss",
    "grad_norm",
    "perturbed_grad_norm",
    "perturbation_norm",
    "cosine",
    "ascended",
)


# Programs that do not depend on the method: runs alike share them.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch(augment, sharding, key, images, labels, index, count):
    """Augmented images and labels of a step, shared out over the devices."""
    here = augment(jax.random.fold_in(key, count), images[index])
    return jax.lax.with_sharding_constraint((here, labels[index]), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _order(num_examples, steps, batch_size, key, epoch):
    """The training examples of an epoch, ``[steps, batch_size]``."""
    shuffle = jax.random.permutation(jax.random.fold_in(key, -1 - epoch), num_examples)
    return shuffle[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(graph, augment, sharding, params, stats, images, labels, index, counts):
    """Sums of cross-entropy and of right answers over the examples that count."""
    images = jax.lax.with_sharding_constraint(augment.normalize(images[index]), sharding)
    logits = nnx.merge(graph, params, stats, copy=True)(images).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
    right = jnp.argmax(logits, -1) == labels[index]
    return jnp.sum(counts * each), jnp.sum(counts * right)


class Run:
    """One training run: data on the devices, the model, the optimizer, and compiled programs.

    Args:
        config: the settings.
        data: a data set in place of the one that the settings name.
        make_step: ``make_step(run) -> step(params, opt_state, stats, images, labels) -> (params,
            opt_state, StepMetrics)``, in place of the library's steps; pure, not jitted.
            ``metrics.aux`` holds the new ``stats`` and the batch's ``accuracy``.
        scan: an epoch as one program; None: where the backend is not the CPU.
        like: a run of the same settings and pixel statistics but for the seed, whose compiled
            programs are taken over; a random method then draws what it drew there.

    Raises:
        ValueError, DataError: a setting that cannot be, a data file that is not there.
    """

    def __init__(  # noqa: D107
        self,
        config: Config,
        data: data_sets.Dataset | None = None,
        make_step: Callable[["Run"], Callable] | None = None,
        scan: bool | None = None,
        like: "Run | None" = None,
    ):
        self.config = config
        self.data = data = config.load() if data is None else data
        self.num_train = len(data.train.labels)
        self.steps_per_epoch = self.num_train // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {config.batch_size} needs more than the {self.num_train} training "
                "examples; lower batch_size"
            )
        if config.devices > jax.device_count():
            raise ValueError(f"devices = {config.devices}, but there are {jax.device_count()}")
        devices = jax.devices()[: config.devices or None]
        if config.batch_size % len(devices):
            raise ValueError(
                f"a batch of {config.batch_size} cannot be shared by {len(devices)} devices; "
                "choose a multiple, or fewer devices"
            )
        mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self._shared = NamedSharding(mesh, PartitionSpec("batch"))
        self._key = jax.random.key(config.seed + 2)
        self.streams = data.train.images.ndim == 1  # paths
        self.size = config.image_size or (224 if self.streams else 0)
        scan = jax.default_backend() != "cpu" if scan is None else scan
        self.scan = scan and not self.streams

        self._build_model(config, data)
        self.tx = config.optimizer(self.steps_per_epoch)
        self.learning_rate = config.learning_rate_schedule(self.steps_per_epoch)
        self.augment = data_sets.augmentation(
            data.train, config.augment, config.cutout_size, self.size, config.standardize
        )
        self.splits = {
            name: tuple(getattr(data, name))
            if self.streams
            else jax.device_put(tuple(getattr(data, name)), self.everywhere)
            for name in ("train", "validation", "test")
        }
        if like is None:
            self._compile(make_step)
            return
        if (dataclasses.replace(like.config, seed=config.seed), like.augment, like.scan) != (
            config, self.augment, self.scan,
        ):  # fmt: skip
            raise ValueError("`like` has other settings or other pixel statistics")
        self._advance, self._whole_epoch = like._advance, like._whole_epoch

    def _build_model(self, config, data):
        side, channels = self.size, 3 if self.streams else data.train.images.shape[-1]
        shape = (side, side, channels) if side else data.train.images.shape[1:]
        build = functools.partial(
            models.build, config.model, shape, data.num_classes, width=config.width
        )
        model = build(rngs=nnx.Rngs(config.seed), dtype=jnp.dtype(config.dtype))
        self.graph, self._params, self._stats = nnx.split(model, nnx.Param, ...)
        if config.init_from:
            pure = map(nnx.as_pure, (self._params, self._stats))
            loaded = imagenet_models.init_from(
                config.init_from, *pure, config.init_without, config.data_dir
            )
            self._params, self._stats = loaded
        self.num_parameters = models.num_parameters(model)
        model.eval()
        self.eval_graph = nnx.split(model)[0]
        # Curvature is computed in float32, whatever the training was.
        exact = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
        exact.eval()
        self.exact_graph = nnx.split(exact)[0]

    def losses(self, params, stats, images, labels):
        """Cross-entropy of each example in training mode, new statistics, and accuracy."""
        model = nnx.merge(self.graph, params, stats, copy=True)
        logits = model(images).astype(jnp.float32)
        targets = jax.nn.one_hot(labels, self.data.num_classes)
        targets = optax.smooth_labels(targets, self.config.label_smoothing)
        each = optax.softmax_cross_entropy(logits, targets)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        stats = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        return each, {"stats": stats, "accuracy": accuracy}

    def mean_loss(self, params, stats, images, labels):
        """The mean of `losses`."""
        each, aux = self.losses(params, stats, images, labels)
        return jnp.mean(each), aux

    def _compile(self, make_step):
        config, on_host = self.config, not self.scan
        shared = {"has_aux": True, "batch_argnums": (1, 2), "num_groups": config.groups}
        if make_step is not None:
            step = make_step(self)
        elif config.method in methods.STEP_OPTIONS:
            share = methods.STEP_OPTIONS[config.method] | config.options
            select = esam_step if config.method == "esam" else ksam_step
            step = select(self.losses, self.tx, gamma=share["gamma"], **shared)
        else:
            build = (
                functools.partial(host_dispatched, donate=True) if on_host else two_gradient_step
            )
            step = build(self.mean_loss, self.tx, num_microbatches=config.microbatches, **shared)
            on_host = False  # `host_dispatched` jits inside.
        if on_host:
            step = jax.jit(step, donate_argnums=(0, 1))

        def advance(state, images, labels):
            params, opt_state, metrics = step(
                state.params, state.opt_state, state.stats, images, labels
            )
            measured = {name: getattr(metrics, name) for name in _SCALARS}
            scalars = {name: x for name, x in measured.items() if x is not None}
            scalars["accuracy"] = metrics.aux["accuracy"]
            stats, average = metrics.aux["stats"], state.average
            if config.model_ema:
                average = average_with((params, stats), average)
            return State(params, stats, opt_state, average), scalars

        @functools.partial(jax.jit, donate_argnums=1)
        def average_with(new, average):
            return optax.incremental_update(new, average, 1 - config.model_ema)

        @functools.partial(jax.jit, donate_argnums=0)
        def whole_epoch(state, key, images, labels, index, first):
            def body(state, item):
                here, count = item
                batch = _batch(self.augment, self._shared, key, images, labels, here, count)
                return advance(state, *batch)

            return jax.lax.scan(body, state, (index, first + jnp.arange(len(index))))

        self._advance, self._whole_epoch = advance, whole_epoch

    def start(self) -> State:
        """The state before the first step."""
        params, stats = map(nnx.as_pure, (self._params, self._stats))
        # A copy: `epoch` donates the state, and a run may start more than once.
        average = (params, stats) if self.config.model_ema else ()
        state = jax.tree.map(jnp.copy, State(params, stats, self.tx.init(params), average))
        return jax.device_put(state, self.everywhere)

    def batch(self, index: Any, count: Any = 0) -> tuple[jax.Array, jax.Array]:
        """Augmented training images and their labels, by position; ``count`` is the step."""
        images, labels = self.splits["train"]
        index = jnp.asarray(index)
        return _batch(self.augment, self._shared, self._key, images, labels, index, count)

    def epoch(
        self, state: State, epoch: int, on_step: Callable[[int, dict], None] = lambda i, s: None
    ) -> tuple[State, dict[str, np.ndarray]]:
        """Train for an epoch.

        Args:
            state: the state before it; its memory is used again.
            epoch: counted from 0; it decides the order and the augmentation.
            on_step: called with a step's number in the epoch and its scalars, while the loop runs;
                an epoch that is one program calls nothing.

        Returns:
            The new state, and per step: the fields of `StepMetrics` that are numbers, and the
            batch's accuracy.
        """
        sizes = (self.num_train, self.steps_per_epoch, self.config.batch_size)
        index, first = _order(*sizes, self._key, epoch), epoch * self.steps_per_epoch
        if self.scan:
            state, scalars = self._whole_epoch(
                state, self._key, *self.splits["train"], index, first
            )
            return state, jax.device_get(scalars)
        rows = []
        batches = self._stream("train", epoch) if self.streams else np.asarray(index)
        for i, here in enumerate(batches):
            if self.streams:
                at = (np.arange(self.config.batch_size), first + i)
                batch = _batch(self.augment, self._shared, self._key, *here, *at)
            else:
                batch = self.batch(here, first + i)
            state, scalars = self._advance(state, *batch)
            rows.append(scalars)
            on_step(i, scalars)
        rows = jax.device_get(rows)
        return state, {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _stream(self, split: str, epoch: int | None = None) -> Iterator:
        """Batches of an image-folder: an epoch of training, or all in order."""
        config = self.config
        seed, crop = None, False
        if epoch is not None:
            seed = int(np.random.SeedSequence([config.seed, epoch]).generate_state(1)[0])
            crop = "resized-crop" in config.augment
        return folder.stream(
            self.splits[split][0],
            self.splits[split][1],
            config.batch_size,
            self.size,
            seed=seed,
            crop=crop,
            workers=config.workers,
        )

    def evaluate(self, state: State, split: str) -> tuple[float, float]:
        """Mean cross-entropy and accuracy on ``train``, ``validation`` or ``test``."""
        images, labels = self.splits[split]
        n = len(labels)
        if not n:
            return float("nan"), float("nan")
        size = -(-min(n, 1000) // self.config.batch_size) * self.config.batch_size
        where, sums = (self.eval_graph, self.augment, self._shared), []
        params, stats = state.average or (state.params, state.stats)
        if self.streams:
            at = np.arange(self.config.batch_size)
            for images, labels in self._stream(split):
                m = len(labels)
                rows = np.minimum(at, m - 1)
                batch = (images[rows], labels[rows], at, at < m)
                sums.append(_evaluate(*where, params, stats, *batch))
            total = np.sum(jax.device_get(sums), axis=0)
            return float(total[0] / n), float(total[1] / n)
        for first in range(0, n, size):
            at = np.arange(first, first + size)
            batch = (images, labels, np.minimum(at, n - 1), at < n)
            sums.append(_evaluate(*where, params, stats, *batch))
        total = np.sum(jax.device_get(sums), axis=0)
        return float(total[0] / n), float(total[1] / n)

    def train_loss(self, state: State, index: Any) -> Callable[[Any], jax.Array]:
        """The loss on some training examples as a function of the parameters.

        In float32, without augmentation, with the running statistics of batch normalization.
        """
        images, labels = (x[np.asarray(index)] for x in self.splits["train"])
        if self.streams:
            images = jnp.stack([folder.decode(p, self.size) for p in images])

        def loss(params):
            model = nnx.merge(self.exact_graph, params, state.stats, copy=True)
            logits = model(self.augment.normalize(images))
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(each)

        return loss

    def top_eigenpair(self, state: State, num_iters: int = 32) -> tuple[float, Any]:
        """The Hessian's first eigenvalue and unit eigenvector; see `lambda_max`."""
        count = min(self.config.hessian_examples, self.num_train)
        loss, key = self.train_loss(state, np.arange(count)), jax.random.key(0)
        params = state.params
        convolves = any(jnp.ndim(x) == 4 for x in jax.tree.leaves(params))
        if jax.default_backend() != "cpu" or not convolves:
            top = jax.jit(
                lambda p: diagnostics.hessian_top_eigenpairs(loss, p, key, num_iters=num_iters)
            )
            values, vectors = top(params)
            return float(values[0]), jax.tree.map(lambda v: v[0], vectors)
        return power_iteration(loss, params, key, num_iters)

    def lambda_max(self, state: State, num_iters: int = 32) -> float:
        """The largest eigenvalue of the Hessian of `train_loss` on ``hessian_examples``."""
        return self.top_eigenpair(state, num_iters)[0]


def power_iteration(
    loss: Callable, params: Any, key: jax.Array, num_iters: int
) -> tuple[float, Any]:
    """The Hessian's eigenpair of largest size, as a Python loop: for convolutions on a CPU.

    At the end of training it is that of the largest eigenvalue.
    """
    # Both are arguments: what is computed from constants alone, XLA computes while it compiles.
    product = jax.jit(lambda p, v: diagnostics.hessian_vector_product(loss, p, v))
    after, vector, value = optax.tree.random_like(key, params, jax.random.normal), None, 0.0
    for _ in range(num_iters):
        vector = optax.tree.scale(1 / optax.tree.norm(after), after)
        after = product(params, vector)
        value = float(jnp.asarray(optax.tree.vdot(vector, after)))
    return value, vector


# --- Files and screen -----------------------------------------------------------------------------


def _mean(values: np.ndarray, steps: np.ndarray) -> float:
    """The mean over some steps; NaN if there are none."""
    return float(np.mean(values[steps])) if steps.any() else float("nan")


def _summary(steps: dict[str, np.ndarray]) -> dict[str, float]:
    """An epoch's row of metrics, from its steps."""
    row = {
        "train_loss": float(np.mean(steps["loss"])),
        "train_accuracy": float(np.mean(steps["accuracy"])),
        "percent_sam": 100 * float(np.mean(steps["ascended"])),
    }
    if "cosine" not in steps:  # one gradient a step: there is no second one to compare with
        return row
    g, gp, cosine = steps["grad_norm"], steps["perturbed_grad_norm"], steps["cosine"]
    ascended = steps["ascended"]  # The others measured nothing of a second gradient.
    moved = ascended & (gp > 0)
    return row | {
        "perturbed_loss": _mean(steps["perturbed_loss"], ascended),
        "surrogate_gap": _mean(steps["perturbed_loss"] - steps["loss"], ascended),
        "grad_norm": float(np.mean(g)),
        "squared_grad_norm": float(np.mean(np.square(g))),
        "perturbed_grad_norm": _mean(gp, ascended),
        "perturbation_norm": float(np.mean(steps["perturbation_norm"])),
        "cosine": _mean(cosine, ascended),
        "norm_ratio": _mean(g / np.where(moved, gp, 1), moved),
        "alignment": _mean(cosine * g * gp - np.square(g), ascended),
    }


def _checkpoints(out: pathlib.Path, every: int):
    import orbax.checkpoint as ocp

    # Written before the next epoch starts: a run that is killed loses one epoch at most.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, save_interval_steps=every, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)


def _restore(manager: Any, epoch: int, state: State) -> tuple[State, list[dict]]:
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    found = manager.restore(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore()
        ),
    )
    return found.state, found.history["rows"]


def _save(manager: Any, epoch: int, state: State, history: list[dict], last: bool) -> None:
    import orbax.checkpoint as ocp

    manager.save(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), history=ocp.args.JsonSave({"rows": history})
        ),
        force=last,
    )


def _scalars_only(row: dict) -> dict:
    return {k: v for k, v in row.items() if isinstance(v, int | float)}


def write(path: pathlib.Path, text: str) -> None:
    """All of a file or nothing, whenever the process is killed."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def _write_csv(path: pathlib.Path, history: list[dict]) -> None:
    rows = [_scalars_only(row) for row in history]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _write_curves(path: pathlib.Path, history: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = {
        "loss": ("train_loss", "perturbed_loss", "validation_loss", "test_loss"),
        "accuracy": ("train_accuracy", "validation_accuracy", "test_accuracy"),
        "gradient norm": ("grad_norm", "perturbed_grad_norm"),
    }
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            values = [row.get(name, float("nan")) for row in history]
            if not np.all(np.isnan(values)):
                axes.plot(range(1, len(values) + 1), values, label=name.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        if axes.has_data():
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def logger(kind: str, out: pathlib.Path) -> Callable[[list[dict]], None]:
    """What writes metrics after every epoch, from all epochs' so far."""
    if kind == "csv":
        return lambda history: _write_csv(out / "metrics.csv", history)
    try:
        board = importlib.import_module("tensorboardX").SummaryWriter(str(out / "tensorboard"))
    except ImportError:
        raise ValueError("--log tensorboard: pip install tensorboardX") from None

    def write_scalars(history):
        for name, value in _scalars_only(history[-1]).items():
            board.add_scalar(name, value, history[-1]["epoch"])
        board.flush()

    return write_scalars


def _progress(console: Console, show: bool) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  acc {task.fields[accuracy]:.3f}"),
        TextColumn("SAM {task.fields[percent_sam]:.0f}%"),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
        transient=True,
    )


def check_directory(out: pathlib.Path, config: Config, resume: bool) -> None:
    """Raise ValueError where a directory holds a run that these settings cannot go on with."""
    path = out / "config.json"
    if not path.exists():
        return
    if not resume:
        raise ValueError(f"{out} holds a run; pass --resume to go on with it")
    before, now = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
    for name in now:
        if name not in ("data_dir", "devices", "workers") and before.get(name) != now[name]:
            raise ValueError(
                f"{out} was run with {name} = {before.get(name)!r}, not {now[name]!r}; resume with "
                "the same settings, or choose another --out"
            )


def fit(
    config: Config,
    out: str | pathlib.Path | None = None,
    *,
    resume: bool = False,
    run: Run | None = None,
    on_epoch: Callable[[Run, State, int], dict] | None = None,
    checkpoint_every: int = 1,
    log: str = "csv",
    show: bool = True,
) -> dict[str, Any]:
    """Train, evaluate after every epoch, write files, and report.

    Args:
        config: the settings.
        out: directory for ``config.json``, ``metrics.csv`` or TensorBoard's files, ``curves.png``,
            ``checkpoints`` and ``report.json``; None: nothing is written.
        resume: go on from the last checkpoint in ``out``, if there is one.
        run: a `Run` in place of ``Run(config)``.
        on_epoch: ``(run, state, epochs done) -> dict``, after every epoch; what it returns joins
            the metrics, lists included.
        checkpoint_every: epochs from one checkpoint to the next.
        log: "csv" or "tensorboard", see `logger`.
        show: whether to print progress.

    Returns:
        The report: ``test_accuracy`` and others at the end, ``best_test_accuracy``, ``lambda_max``,
        ``seconds_per_epoch`` (median, without compiling), ``percent_sam``, ``gradients`` (of a
        batch, in all), and ``history``, a
        dictionary per epoch.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is False, or that run had other settings.
    """
    console = Console(stderr=True)
    run = Run(config) if run is None else run
    state, history, manager, write_metrics = run.start(), [], None, None
    if out is not None:
        out = pathlib.Path(out)
        check_directory(out, config, resume)
        out.mkdir(parents=True, exist_ok=True)
        write(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        manager, write_metrics = _checkpoints(out, checkpoint_every), logger(log, out)
        if (done := manager.latest_step()) is not None:
            state, history = _restore(manager, done, state)
            if show:
                console.print(f"resumed after epoch {done}")
    before = len(history)

    with _progress(console, show) as progress:
        bar = progress.add_task(
            "", total=run.steps_per_epoch * config.epochs, completed=before * run.steps_per_epoch,
            epoch=f"{before + 1}/{config.epochs}", loss=np.nan, accuracy=np.nan, percent_sam=0.0,
        )  # fmt: skip
        for epoch in range(before, config.epochs):

            def on_step(i, scalars, epoch=epoch):
                if not progress.disable and i % 10 == 0:
                    progress.update(
                        bar,
                        completed=epoch * run.steps_per_epoch + i,
                        loss=float(scalars["loss"]),
                        accuracy=float(scalars["accuracy"]),
                    )

            began = time.perf_counter()
            state, steps = run.epoch(state, epoch, on_step)
            row: dict[str, Any] = {"epoch": epoch + 1, **_summary(steps)}
            row["seconds"] = time.perf_counter() - began
            last_step = (epoch + 1) * run.steps_per_epoch - 1
            row["learning_rate"] = float(jnp.asarray(run.learning_rate(last_step)))
            for split in ("validation", "test"):
                row[f"{split}_loss"], row[f"{split}_accuracy"] = run.evaluate(state, split)
            if on_epoch is not None:
                row |= on_epoch(run, state, epoch + 1)
            history.append(row)
            progress.update(
                bar,
                completed=(epoch + 1) * run.steps_per_epoch,
                epoch=f"{min(epoch + 2, config.epochs)}/{config.epochs}",
                loss=row["train_loss"],
                accuracy=row["train_accuracy"],
                percent_sam=row["percent_sam"],
            )
            if show and not console.is_terminal:
                console.print(
                    f"epoch {epoch + 1}/{config.epochs}  loss {row['train_loss']:.4f}  "
                    f"train {row['train_accuracy']:.4f}  test {row['test_accuracy']:.4f}  "
                    f"SAM {row['percent_sam']:.0f}%  {row['seconds']:.2f} s",
                    highlight=False,
                )
            if write_metrics is not None:
                write_metrics(history)
                _save(manager, epoch + 1, state, history, epoch + 1 == config.epochs)

    report = _report(run, state, history, before)
    if out is not None:
        _write_curves(out / "curves.png", history)
        write(out / "report.json", json.dumps(report, indent=1))
    if manager is not None:
        manager.close()
    return report


def _report(run: Run, state: State, history: list[dict], before: int) -> dict[str, Any]:
    last, config = history[-1], run.config
    train_loss, train_accuracy = run.evaluate(state, "train")
    # The first epoch of this process compiles.
    timed = [row["seconds"] for row in history[before + 1 :] or history[-1:]]
    held_out = len(run.data.validation.labels) > 0
    percent_sam = statistics.fmean(row["percent_sam"] for row in history)
    return {
        "method": config.method,
        "seed": config.seed,
        "num_parameters": run.num_parameters,
        "test_accuracy": last["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in history),
        "test_loss": last["test_loss"],
        "validation_accuracy": last["validation_accuracy"] if held_out else None,
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "lambda_max": run.lambda_max(state) if config.hessian_examples else None,
        "seconds_per_epoch": statistics.median(timed),
        "percent_sam": percent_sam,
        "gradients": round(run.steps_per_epoch * config.epochs * (1 + percent_sam / 100)),
        "devices": f"{len(run.everywhere.device_set)} x {jax.devices()[0].device_kind}",
        "history": history,
    }


# --- Command line ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line."""

    settings: tyro.conf.OmitArgPrefixes[Config] = Config()
    config: str | None = None
    """TOML file; the command line overrides it."""
    out: str | None = None
    """Directory for metrics, curves and checkpoints; else none."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint."""
    checkpoint_every: int = 1
    """Epochs from one checkpoint to the next."""
    log: Literal["csv", "tensorboard"] = "csv"
    """How metrics are written: to metrics.csv, or for TensorBoard."""
    seeds: tuple[int, ...] = ()
    """Several runs, in place of --seed."""
    tune: tuple[str, ...] = ()
    """An option and its values: a run for each, ranked by validation accuracy."""


def _file(argv: list[str]) -> dict[str, Any]:
    """The settings of the file that the command line names."""
    path = next((after for word, after in itertools.pairwise(argv) if word == "--config"), None)
    if path is None:
        return {}
    try:
        return tomllib.loads(pathlib.Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from None


def _options(words: list[str]) -> dict[str, Any]:
    """Options of a method: all that is neither a setting nor of the command line."""
    names, values = words[::2], words[1::2]
    if len(words) % 2 or not all(name.startswith("--") for name in names):
        raise ValueError(f"unknown arguments: {' '.join(words)}")
    return {
        name[2:].replace("-", "_"): _value(value) for name, value in zip(names, values, strict=True)
    }


def read_command(argv: list[str]) -> tuple[Command, dict[str, Any]]:
    """The command line, and the settings that it and its file make."""
    file = Config.read(_file(argv))
    command, rest = tyro.cli(
        Command,
        prog="python -m examples.papers.train",
        description=__doc__,
        args=argv,
        default=Command(file),
        return_unknown_args=True,
    )
    names = [field.name for field in dataclasses.fields(Config)]
    settings = {name: getattr(command.settings, name) for name in names}
    if settings["method"] != file.method:  # whose options and parts are not meant for this one
        settings |= {"options": {}, **dict.fromkeys(_PARTS)}
    if command.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be above 0, got {command.checkpoint_every}")
    return command, settings | {"options": settings["options"] | _options(rest)}


def _value(text: str) -> Any:
    """A number where it is one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _variants(command: Command, settings: dict[str, Any]) -> list[tuple[str, Config]]:
    """The runs that the command line asks for, by name."""
    seeds = command.seeds or (settings["seed"],)
    if not command.tune:
        return [(f"seed {s}", Config.read(settings | {"seed": s})) for s in seeds]
    option, *values = command.tune
    option = option.replace("-", "_")
    if not settings["validation"]:
        raise ValueError("--tune ranks by validation accuracy; pass --validation 0.1")
    if not values:
        raise ValueError("--tune takes an option and its values: --tune rho 0.02 0.05 0.1 0.2")
    return [
        (f"{option} {v}, seed {s}", Config.read(settings | {option: _value(v), "seed": s}))
        for v in values
        for s in seeds
    ]


def _show(console: Console, reports: dict[str, dict], spread: bool) -> None:
    rows = {
        "test accuracy": ("test_accuracy", "{:.4f}"),
        "best test accuracy": ("best_test_accuracy", "{:.4f}"),
        "validation accuracy": ("validation_accuracy", "{:.4f}"),
        "train accuracy": ("train_accuracy", "{:.4f}"),
        "train loss": ("train_loss", "{:.4f}"),
        "lambda_max": ("lambda_max", "{:.3f}"),
        "seconds per epoch": ("seconds_per_epoch", "{:.3f}"),
        "%SAM": ("percent_sam", "{:.1f}"),
    }
    table = Table("", *reports, *(["mean", "std"] if spread else []))
    for title, (name, form) in rows.items():
        values = [report[name] for report in reports.values()]
        if any(value is None for value in values):
            continue
        more = [statistics.fmean(values), statistics.stdev(values)] if spread else []
        table.add_row(title, *(form.format(value) for value in [*values, *more]))
    console.print(table)


def _complain(error: Exception) -> int:
    print(f"train.py: error: {error}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """The command line; returns an exit status."""
    console, reports = Console(), {}
    folders: dict[str, pathlib.Path | None] = {}
    try:
        command, settings = read_command(sys.argv[1:] if argv is None else argv)
        if command.resume and not command.out:
            raise ValueError("--resume goes on with the run in --out; pass it")
        variants = _variants(command, settings)
        # All of them before the first one trains.
        for name, config in variants:
            out = pathlib.Path(command.out) if command.out else None
            if out and len(variants) > 1:
                out /= name.replace(", ", "-").replace(" ", "-")
            if out:
                check_directory(out, config, command.resume)
                out.mkdir(parents=True, exist_ok=True)
            config.optimizer(1)
            folders[name] = out
    except (OSError, ValueError) as error:
        return _complain(error)
    for name, config in variants:
        try:
            run = Run(config)
        except ValueError as error:
            return _complain(error)
        reports[name] = fit(
            config,
            folders[name],
            resume=command.resume,
            run=run,
            checkpoint_every=command.checkpoint_every,
            log=command.log,
        )
    _show(console, reports, spread=len(reports) > 1 and not command.tune)
    if command.tune:
        scores: dict[str, list[float]] = {}
        for name, report in reports.items():
            scores.setdefault(name.split(",")[0], []).append(report["validation_accuracy"])
        best = max(scores, key=lambda name: statistics.fmean(scores[name]))
        console.print(f"best by validation accuracy: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
