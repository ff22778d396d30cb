# smoke: --only linen_train_state multi_steps
"""Sharpness-aware training in trainers that others wrote, and what has to change for it.

    python examples/trainers.py                     # all whose packages are installed
    python examples/trainers.py --only keras_fit    # one

A trainer's own code is ``train``, and stays as it is. The lines that differ are marked with a form:

- ``<- one gradient``: an optimizer at the price of plain training. The trainer then holds displaced
  parameters; ``clean_params`` are those to evaluate, to save and to report.
- ``<- loss``: two gradients a step, wherever the trainer takes a loss.
- ``<- gradient``: the same where the gradient is computed in your own code, which then carries the
  method's state. It takes every method; a loss only those without memory.
- ``<- optimizer``: the same where the trainer hands the optimizer its loss.

Printed is how far parameters and statistics are from those of a loop written by hand, after six
steps in float32.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import (
    clean_params,
    momentum_sam,
    nnx_sharpness_aware_loss,
    nnx_sharpness_aware_value_and_grad,
    sam,
    sharpness_aware_loss,
    sharpness_aware_value_and_grad,
)

RHO = 0.1
METHOD = sam(optax.identity(), rho=RHO)
BASE = optax.chain(
    optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9)
)
INPUTS = jax.random.normal(jax.random.key(0), (6, 16, 3))
TARGETS = jnp.sin(jnp.sum(INPUTS, axis=-1, keepdims=True))
BATCHES = list(zip(INPUTS, TARGETS, strict=True))


# --- By hand --------------------------------------------------------------------------------------

FORMS = ("unchanged", "one gradient", "two gradients")


def add(tree: Any, other: Any, scale: Any = 1.0) -> Any:
    """Leaf by leaf, ``tree + scale * other``."""
    return jax.tree.map(lambda x, y: x + scale * y, tree, other)


class ByHand:
    """Plain training, Momentum-SAM or SAM, out of gradients and a base optimizer."""

    def __init__(self, form: str, params: Any, stats: Any = None, base: Any = BASE):
        """Before the first step."""
        self.form, self.params, self.stats = form, params, stats
        self.base, self.state = base, base.init(params)
        self.momentum = self.displacement = jax.tree.map(jnp.zeros_like, params)

    def step(self, grad_fn: Callable, batches: Iterable) -> None:
        """From ``grad_fn(params, stats, *batch) -> (gradient, stats)`` and its micro-batches."""
        found = []
        for batch in batches:
            at = add(self.params, self.displacement)
            gradient, moved = grad_fn(at, self.stats, *batch)
            if self.form == "two gradients":
                at = add(at, gradient, RHO / optax.tree.norm(gradient))
                gradient, _ = grad_fn(at, self.stats, *batch)
            self.stats = moved
            found.append(gradient)
        mean = jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)
        updates, self.state = self.base.update(mean, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)
        if self.form == "one gradient":
            self.momentum = add(mean, self.momentum, 0.9)
            scale = -RHO / optax.tree.norm(self.momentum)
            self.displacement = jax.tree.map(lambda x: scale * x, self.momentum)


def by_hand(loss, params, batches=BATCHES, *, stats=None, micro_batches=1, base=BASE):
    """For every form, parameters and statistics after all batches.

    ``loss(params, stats, *batch)`` returns the loss and the statistics after it.
    """
    grad_fn = jax.jit(jax.grad(loss, has_aux=True))
    runs = [ByHand(form, params, stats, base) for form in FORMS]
    for run in runs:
        for i in range(0, len(batches), micro_batches):
            run.step(grad_fn, batches[i : i + micro_batches])
    return {run.form: (run.params, run.stats) for run in runs}


def compared(wanted: dict, **got: Any) -> dict[str, tuple[Any, Any]]:
    """What came out of each form, beside what should have; ``got`` is (parameters, statistics)."""
    forms = {"unchanged": "unchanged", "one_gradient": "one gradient"}
    return {name: (found, wanted[forms.get(name, FORMS[2])]) for name, found in got.items()}


def deviation(got: Any, wanted: Any) -> float:
    """The largest difference of two numbers in two trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)


# --- Flax -----------------------------------------------------------------------------------------


def linen_train_state():
    """Flax's ``TrainState``, with its own ``apply_gradients``."""
    from flax import linen as nn
    from flax.training.train_state import TrainState

    net = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    params = net.init(jax.random.key(0), INPUTS[0])["params"]

    def loss_fn(params, x, y):
        return jnp.mean((net.apply({"params": params}, x) - y) ** 2)

    def train(tx, loss_fn):
        state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

        @jax.jit
        def step(state, x, y):
            return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, x, y))

        for x, y in BATCHES:
            state = step(state, x, y)
        return state

    plain = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    state = train(tx, loss_fn)
    clean = clean_params(state.params, state.opt_state)  # <- one gradient

    sharp_loss = sharpness_aware_loss(loss_fn, METHOD)  # <- loss
    sharp = train(BASE, sharp_loss)

    gradient = sharpness_aware_value_and_grad(loss_fn, METHOD)  # <- gradient

    @jax.jit
    def step(state, memory, x, y):
        found, memory = gradient.value_and_grad(state.params, memory, x, y)  # <- gradient
        return state.apply_gradients(grads=found.grads), memory  # <- gradient

    last = TrainState.create(apply_fn=net.apply, params=params, tx=BASE)
    memory = gradient.init(params)  # <- gradient
    for x, y in BATCHES:
        last, memory = step(last, memory, x, y)

    return compared(
        by_hand(lambda params, _, x, y: (loss_fn(params, x, y), None), params),
        unchanged=(plain.params, None),
        one_gradient=(clean, None),
        loss=(sharp.params, None),
        gradient=(last.params, None),
    )


def nnx_optimizer():
    """Flax's ``nnx.Optimizer``, with its own ``update``, and a model with running statistics."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.norm(self.first(x))))

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    def train(tx, loss_fn):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            optimizer.update(model, nnx.grad(loss_fn)(model, x, y))

        for x, y in BATCHES:
            step(model, optimizer, x, y)
        return model, optimizer

    plain, _ = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    model, optimizer = train(tx, loss_fn)
    clean = clean_params(nnx.state(model, nnx.Param), optimizer.opt_state)  # <- one gradient
    nnx.update(model, clean)  # <- one gradient

    sharp_loss = nnx_sharpness_aware_loss(loss_fn, METHOD)  # <- loss
    sharp, _ = train(BASE, sharp_loss)

    gradient = nnx_sharpness_aware_value_and_grad(loss_fn, METHOD)  # <- gradient

    @nnx.jit
    def step(model, optimizer, memory, x, y):
        found, memory = gradient.value_and_grad(model, memory, x, y)  # <- gradient
        optimizer.update(model, found.grads)  # <- gradient
        return memory

    last = Net(nnx.Rngs(0))
    last_optimizer = nnx.Optimizer(last, BASE, wrt=nnx.Param)
    memory = gradient.init(last)  # <- gradient
    for x, y in BATCHES:
        memory = step(last, last_optimizer, memory, x, y)

    def parts(model):
        _, params, stats = nnx.split(model, nnx.Param, ...)
        return nnx.as_pure(params), nnx.as_pure(stats)

    start = Net(nnx.Rngs(0))

    def loss(params, stats, x, y):
        model = nnx.merge(nnx.graphdef(start), params, stats, copy=True)
        return loss_fn(model, x, y), parts(model)[1]

    params, stats = parts(start)
    return compared(
        by_hand(loss, params, stats=stats),
        unchanged=parts(plain),
        one_gradient=parts(model),
        loss=parts(sharp),
        gradient=parts(last),
    )


def tunix_peft():
    """Tunix' ``PeftTrainer`` of a Qwix LoRA: what is perturbed, and trained, is the adapter."""
    import qwix
    from flax import nnx
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))

    def build():
        provider = qwix.LoraProvider(module_path="first|last", rank=2, alpha=2.0)
        return qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, INPUTS[0], rngs=nnx.Rngs(1))

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    def train(tx, loss_fn):
        config = TrainingConfig(eval_every_n_steps=100, max_steps=6, pbar_description=None)
        trainer = PeftTrainer(build(), tx, config).with_loss_fn(loss_fn)
        trainer.with_gen_model_input_fn(lambda pair: {"x": pair[0], "y": pair[1]}).train(BATCHES)
        return trainer

    plain = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    trainer = train(tx, loss_fn)
    held = nnx.state(trainer.model, nnx.LoRAParam)
    clean = clean_params(held, trainer.optimizer.opt_state)  # <- one gradient

    sharp_loss = nnx_sharpness_aware_loss(loss_fn, METHOD, wrt=nnx.LoRAParam)  # <- loss
    sharp = train(BASE, sharp_loss)

    def adapter(model):
        return nnx.as_pure(nnx.state(model, nnx.LoRAParam)), None

    graphdef, params, rest = nnx.split(build(), nnx.LoRAParam, ...)

    def loss(params, _, x, y):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), x, y), None

    return compared(
        by_hand(loss, nnx.as_pure(params)),
        unchanged=adapter(plain.model),
        one_gradient=(nnx.as_pure(clean), None),
        loss=adapter(sharp.model),
    )


# --- Equinox, Optimistix, Haiku -------------------------------------------------------------------


def equinox_loop():
    """Equinox, as its documents train: ``filter_jit`` and ``filter_grad``."""
    import equinox as eqx

    start = eqx.nn.MLP(3, 1, width_size=8, depth=1, activation=jnp.tanh, key=jax.random.key(0))

    def loss_fn(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    def arrays(model):
        return eqx.filter(model, eqx.is_inexact_array)

    def train(tx, loss_fn):
        model, opt_state = start, tx.init(arrays(start))

        @eqx.filter_jit
        def step(model, opt_state, x, y):
            grads = eqx.filter_grad(loss_fn)(model, x, y)
            updates, opt_state = tx.update(grads, opt_state, arrays(model))
            return eqx.apply_updates(model, updates), opt_state

        for x, y in BATCHES:
            model, opt_state = step(model, opt_state, x, y)
        return model, opt_state

    plain, _ = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    model, opt_state = train(tx, loss_fn)
    model = eqx.combine(clean_params(arrays(model), opt_state), model)  # <- one gradient

    sharp_loss = sharpness_aware_loss(loss_fn, METHOD)  # <- loss
    sharp, _ = train(BASE, sharp_loss)

    params, static = eqx.partition(start, eqx.is_inexact_array)

    def loss_of_arrays(params, x, y):
        return loss_fn(eqx.combine(params, static), x, y)

    gradient = sharpness_aware_value_and_grad(loss_of_arrays, METHOD)  # <- gradient

    @jax.jit
    def step(params, opt_state, memory, x, y):
        found, memory = gradient.value_and_grad(params, memory, x, y)  # <- gradient
        updates, opt_state = BASE.update(found.grads, opt_state, params)  # <- gradient
        return eqx.apply_updates(params, updates), opt_state, memory

    last, last_state, memory = params, BASE.init(params), gradient.init(params)  # <- gradient
    for x, y in BATCHES:
        last, last_state, memory = step(last, last_state, memory, x, y)

    return compared(
        by_hand(lambda params, _, x, y: (loss_of_arrays(params, x, y), None), params),
        unchanged=(arrays(plain), None),
        one_gradient=(arrays(model), None),
        loss=(arrays(sharp), None),
        gradient=(last, None),
    )


def optimistix_minimise():
    """Optimistix' ``OptaxMinimiser``, whose loop is its own.

    Its stopping rule looks at the parameters that the solver holds. With a constant radius those
    are displaced to the end: where it stops, the displaced point is at a minimum, and not the clean
    one. A radius that goes to zero, ``rho=optax.linear_schedule(...)``, needs the time to do so.
    """
    import optimistix as optx

    x, y = BATCHES[0]
    start = {"in": INPUTS[1, :8], "out": INPUTS[2, :8, :1]}

    def loss_fn(params, args):
        x, y = args
        return jnp.mean((jnp.tanh(x @ params["in"].T) @ params["out"] - y) ** 2)

    def train(tx, loss_fn):
        solver = optx.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
        return optx.minimise(loss_fn, solver, start, (x, y), max_steps=6, throw=False)

    plain = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    solution = train(tx, loss_fn)
    clean = clean_params(solution.value, solution.state.opt_state)  # <- one gradient

    sharp_loss = sharpness_aware_loss(loss_fn, METHOD)  # <- loss
    sharp = train(BASE, sharp_loss)

    tx = sam(BASE, rho=RHO)  # <- optimizer
    itself = train(tx, loss_fn)

    return compared(
        by_hand(lambda params, _, *args: (loss_fn(params, args), None), start, [(x, y)] * 6),
        unchanged=(plain.value, None),
        one_gradient=(clean, None),
        loss=(sharp.value, None),
        optimizer=(itself.value, None),
    )


def haiku_loop():
    """Haiku, with running statistics as auxiliary output of the loss."""
    import haiku as hk

    @hk.transform_with_state
    def net(x):
        x = hk.BatchNorm(True, True, decay_rate=0.9)(hk.Linear(8)(x), is_training=True)
        return hk.Linear(1)(jnp.tanh(x))

    params, stats = net.init(jax.random.key(0), INPUTS[0])

    def loss_fn(params, stats, x, y):
        out, stats = net.apply(params, stats, None, x)
        return jnp.mean((out - y) ** 2), stats

    def train(tx, loss_fn):
        @jax.jit
        def step(params, stats, opt_state, x, y):
            grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), stats, opt_state

        now = params, stats, tx.init(params)
        for x, y in BATCHES:
            now = step(*now, x, y)
        return now

    plain = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    held, moved, opt_state = train(tx, loss_fn)
    clean = clean_params(held, opt_state)  # <- one gradient

    sharp_loss = sharpness_aware_loss(loss_fn, METHOD, has_aux=True)  # <- loss
    sharp = train(BASE, sharp_loss)

    gradient = sharpness_aware_value_and_grad(loss_fn, METHOD, has_aux=True)  # <- gradient

    @jax.jit
    def step(params, stats, opt_state, memory, x, y):
        found, memory = gradient.value_and_grad(params, memory, stats, x, y)  # <- gradient
        updates, opt_state = BASE.update(found.grads, opt_state, params)  # <- gradient
        return optax.apply_updates(params, updates), found.aux, opt_state, memory

    last = params, stats, BASE.init(params), gradient.init(params)  # <- gradient
    for x, y in BATCHES:
        last = step(*last, x, y)

    return compared(
        by_hand(loss_fn, params, stats=stats),
        unchanged=plain[:2],
        one_gradient=(clean, moved),
        loss=sharp[:2],
        gradient=last[:2],
    )


# --- Optax ----------------------------------------------------------------------------------------


def multi_steps():
    """``optax.MultiSteps``: an update every second batch, from the mean of two gradients.

    With one gradient, both batches see the same displaced point; with two, each ascends by itself.
    """
    params = {"in": INPUTS[1, :8], "out": INPUTS[2, :8, :1]}

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["in"].T) @ params["out"] - y) ** 2)

    def train(base, loss_fn):
        tx = optax.MultiSteps(base, every_k_schedule=2)

        @jax.jit
        def step(params, opt_state, x, y):
            grads = jax.grad(loss_fn)(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        now = params, tx.init(params)
        for x, y in BATCHES:
            now = step(*now, x, y)
        return now

    plain, _ = train(BASE, loss_fn)

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    held, opt_state = train(tx, loss_fn)
    clean = clean_params(held, opt_state)  # <- one gradient

    sharp_loss = sharpness_aware_loss(loss_fn, METHOD)  # <- loss
    sharp, _ = train(BASE, sharp_loss)

    gradient = sharpness_aware_value_and_grad(loss_fn, METHOD)  # <- gradient
    tx = optax.MultiSteps(BASE, every_k_schedule=2)

    @jax.jit
    def step(params, opt_state, memory, x, y):
        found, memory = gradient.value_and_grad(params, memory, x, y)  # <- gradient
        updates, opt_state = tx.update(found.grads, opt_state, params)  # <- gradient
        return optax.apply_updates(params, updates), opt_state, memory

    last = params, tx.init(params), gradient.init(params)  # <- gradient
    for x, y in BATCHES:
        last = step(*last, x, y)

    return compared(
        by_hand(lambda params, _, x, y: (loss_fn(params, x, y), None), params, micro_batches=2),
        unchanged=(plain, None),
        one_gradient=(clean, None),
        loss=(sharp, None),
        gradient=(last[0], None),
    )


# --- NumPyro --------------------------------------------------------------------------------------

DATA = INPUTS[0, :, 0]


def posterior():
    """A mean with unknown value, and a normal guide whose scale is positive, and small at first."""
    import numpyro
    from numpyro import distributions as dist

    def model(data):
        mean = numpyro.sample("mean", dist.Normal(0, 10))
        with numpyro.plate("data", len(data)):
            numpyro.sample("observed", dist.Normal(mean, 1), obs=data)

    def guide(data):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 0.05, constraint=dist.constraints.positive)
        numpyro.sample("mean", dist.Normal(loc, scale))

    return model, guide


def numpyro_svi():
    """NumPyro's ``SVI`` and its adapter ``optax_to_numpyro``.

    An ELBO is a function of the *constrained* parameters. Wrapped itself, a scale of 0.05 is
    displaced by up to 0.1, below zero, and nothing says so (`numpyro_trap`). What the optimizer is
    given is a function of the unconstrained ones: that is the one to wrap.
    """
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import optax_to_numpyro

    def train(optimizer):
        svi = SVI(*posterior(), optimizer, Trace_ELBO())
        return svi, svi.run(jax.random.key(0), 6, DATA, progress_bar=False).state

    svi, plain = train(optax_to_numpyro(BASE))

    tx = momentum_sam(BASE, rho=RHO, in_place=True)  # <- one gradient
    _, state = train(optax_to_numpyro(tx))
    clean = svi.constrain_fn(clean_params(*state.optim_state[1]))  # <- one gradient

    sharp_of = functools.partial(sharpness_aware_loss, method=METHOD, has_aux=True)  # <- loss
    optimizer = optax_to_numpyro(BASE)
    take_step = optimizer.eval_and_update  # <- loss
    optimizer.eval_and_update = lambda f, *a, **k: take_step(sharp_of(f), *a, **k)  # <- loss
    _, sharp = train(optimizer)

    start = svi.init(jax.random.key(0), DATA)
    keys, key = [], start.rng_key
    for _ in range(6):
        key, key_step = jax.random.split(key)
        keys.append((key_step,))

    def loss(params, _, key):
        return Trace_ELBO().loss(key, svi.constrain_fn(params), *posterior(), DATA), None

    wanted = by_hand(loss, svi.optim.get_params(start.optim_state), keys)
    return compared(
        {form: (svi.constrain_fn(params), None) for form, (params, _) in wanted.items()},
        unchanged=(svi.get_params(plain), None),
        one_gradient=(clean, None),
        loss=(svi.get_params(sharp), None),
    )


def numpyro_trap():
    """What not to do: the parameters after one step, with the loss form around ``Trace_ELBO``."""
    from numpyro.infer import SVI, Trace_ELBO

    class Sharp(Trace_ELBO):
        def loss(self, rng_key, param_map, *args, **kwargs):
            sharp_loss = sharpness_aware_loss(super().loss, METHOD, argnums=1)
            return sharp_loss(rng_key, param_map, *args, **kwargs)

    svi = SVI(*posterior(), BASE, Sharp())
    return svi.run(jax.random.key(0), 1, DATA, progress_bar=False).params


# --- Keras ----------------------------------------------------------------------------------------


def keras_optimizer(tx: optax.GradientTransformation) -> Any:
    """An Optax transformation as an optimizer of Keras 3 on JAX, which has no holder for one.

    Its ``state`` is that of the transformation. Decay, clipping and learning rate are ``tx``'s.
    """
    import keras

    class Optax(keras.optimizers.Optimizer):
        def __init__(self):
            super().__init__(learning_rate=1.0)

        def build(self, variables):
            super().build(variables)
            leaves, self.structure = jax.tree.flatten(tx.init([v.value for v in variables]))
            self.leaves = [
                self.add_variable(x.shape, lambda *_, x=x, **__: x, x.dtype) for x in leaves
            ]

        @property
        def state(self):
            return jax.tree.unflatten(self.structure, [v.value for v in self.leaves])

        def apply(self, grads, trainable_variables=None):
            variables = trainable_variables or self._trainable_variables
            params = [v.value for v in variables]
            updates, state = tx.update(list(grads), self.state, params)
            new = [*optax.apply_updates(params, updates), *jax.tree.leaves(state)]
            for variable, value in zip([*variables, *self.leaves], new, strict=True):
                variable.assign(value)
            self.iterations.assign_add(1)

    return Optax()


def keras_fit():
    """Keras 3 on JAX, with its own ``fit``: for the loss form, with its own optimizers."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
    import keras

    def build():
        keras.utils.set_random_seed(0)
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(8),
                layers.BatchNormalization(),
                layers.Activation("tanh"),
                layers.Dense(1),
            ]
        )

    def train(model, optimizer):
        model.compile(optimizer, loss="mse")
        x, y = INPUTS.reshape(-1, 3), TARGETS.reshape(-1, 1)
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        return model

    base = optax.sgd(0.1, momentum=0.9)  # what `keras.optimizers.SGD` computes
    plain = train(build(), keras.optimizers.SGD(0.1, momentum=0.9))

    optimizer = keras_optimizer(momentum_sam(base, rho=RHO, in_place=True))  # <- one gradient
    model = train(build(), optimizer)
    held = [v.value for v in model.trainable_variables]
    clean = clean_params(held, optimizer.state)  # <- one gradient
    [v.assign(x) for v, x in zip(model.trainable_variables, clean, strict=True)]  # <- one gradient

    sharp = build()
    loss_fn = sharp.compute_loss_and_updates
    sharp.compute_loss_and_updates = sharpness_aware_loss(loss_fn, METHOD, has_aux=True)  # <- loss
    sharp = train(sharp, keras.optimizers.SGD(0.1, momentum=0.9))

    def parts(model):
        params, stats = model.trainable_variables, model.non_trainable_variables
        return [v.value for v in params], [v.value for v in stats]

    start = build()

    def loss(params, stats, x, y):
        out, stats = start.stateless_call(params, stats, x, training=True)
        return jnp.mean((out - y) ** 2), stats

    params, stats = parts(start)
    return compared(
        by_hand(loss, params, stats=stats, base=base),
        unchanged=parts(plain),
        one_gradient=parts(model),
        loss=parts(sharp),
    )


TRAINERS: dict[str, Callable[[], dict[str, tuple[Any, Any]]]] = {
    trainer.__name__: trainer
    for trainer in (
        linen_train_state,
        nnx_optimizer,
        tunix_peft,
        equinox_loop,
        optimistix_minimise,
        haiku_loop,
        multi_steps,
        numpyro_svi,
        keras_fit,
    )
}


def main(argv: Any = None) -> dict[str, dict[str, float]]:
    """Run them; returns what is printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=[], metavar="TRAINER")
    args = parser.parse_args(argv)

    deviations = {}
    for name in args.only or TRAINERS:
        try:
            found = TRAINERS[name]()
        except ModuleNotFoundError as error:
            if args.only:
                raise
            print(f'{name}: needs {error.name}, as in: pip install ".[clients]"')
            continue
        deviations[name] = {form: deviation(*pair) for form, pair in found.items()}
        print(f"{name}: " + ", ".join(f"{k} {v:.0e}" for k, v in deviations[name].items()))
    return deviations


if __name__ == "__main__":
    main()
