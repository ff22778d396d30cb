"""What public code computed, as numbers in golden/: the references and the library do the same.

The runs are found by a glob, and every file needs a row in `ROWS`.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import bayesian, perturbations, policies, surrogates, training
from tests.oracles import problems, references
from tests.oracles.rows import untyped

pytestmark = pytest.mark.usefixtures("float64")
FILES = {
    path.name.removesuffix(".json.gz"): json.loads(gzip.decompress(path.read_bytes()))
    for path in sorted(problems.GOLDEN.glob("*.json.gz"))
}
RUNS = [(code, case) for code, file in FILES.items() for case in file["runs"]]


class Run:
    """A stored run: its problem, its hyperparameters, its base optimizer in NumPy and in Optax."""

    def __init__(self, code: str, case: str):
        self.stored = FILES[code]["runs"][case]
        self.h = SimpleNamespace(**self.stored["hyperparameters"])
        self.guard = self.stored["guard"]
        steps = self.stored["steps"][-1]
        if self.stored["problem"] == "mlp":
            self.problem = problems.classification(steps, self.stored.get("kept"))
            if self.stored.get("interleaved"):
                both = problems.classification(2 * steps).batches
                self.problem = self.problem._replace(
                    batches=tuple(x[::2] for x in both),
                    perturbed_batches=tuple(x[1::2] for x in both),
                )
        else:
            self.problem = problems.rosenbrock(steps)
        settings = dict(self.stored["base"])
        kind, self.learning_rate = settings.pop("name"), scheduled(settings.pop("learning_rate"))
        self.base = getattr(optax, kind)(self.learning_rate, **settings)
        self.inputs = (
            self.problem.start,
            self.problem.gradients(self.problem.batches),
            getattr(references, kind)(self.learning_rate, **settings),
        )

    @property
    def network_inputs(self) -> tuple[np.ndarray, list[references.Network], references.Base]:
        """`inputs` of the references that look at outputs."""
        start, _, base = self.inputs
        return start, problems.classify_networks(self.problem), base

    def check(self, followed: Any, slack: float) -> None:
        """Rounding, as far as it grows (golden/README.md), and slack for the source's guards."""
        growth = np.array(self.stored["growth"])
        params = np.array(self.stored["params"])
        for i, step in enumerate(self.stored["steps"]):
            chex.assert_trees_all_close(
                jax.tree.map(lambda leaf, step=step: np.asarray(leaf[step - 1]), followed),
                self.problem.unflatten(params[i]),
                rtol=0,
                atol=1e-14 * max(10, growth[i]) + slack,
            )


def scheduled(value: Any) -> Any:
    """A number, or the schedule that a list of numbers is, in NumPy (an int) and inside jit."""
    if not isinstance(value, list):
        return value
    return lambda t: value[t] if isinstance(t, int) else jnp.asarray(value)[t]


def ball(run: Run) -> references.Ascent:
    return references.ball(run.h.rho, run.guard)


def absolute_values(params: Any) -> Any:
    return jax.tree.map(jnp.abs, params)


def reference_gsam(run: Run):
    """rho is a number, a table, or proportional to the learning rate."""
    rho = scheduled(run.h.rho)
    if isinstance(rho, dict):
        rho = [
            references.proportional_rho(run.learning_rate(t), **rho)
            for t in range(run.problem.steps)
        ]
        rho = scheduled(rho)
    return references.gsam(*run.inputs, rho=rho, alpha=run.h.alpha, eps=run.guard)


def library_gsam(run: Run):
    rho = scheduled(run.h.rho)
    if isinstance(rho, dict):
        rho = sam_optax.proportional_rho(run.learning_rate, **run.h.rho)
    return sam_optax.gsam(run.base, rho=rho, alpha=run.h.alpha)


def reference_wsam(run: Run):
    if run.h.decouple:
        return references.wsam(*run.inputs, ball(run), lr=run.learning_rate, gamma=run.h.gamma)
    return references.coupled_wsam(*run.inputs, ball(run), gamma=run.h.gamma)


def library_wsam(run: Run):
    if run.h.decouple:
        return sam_optax.wsam(run.base, run.learning_rate, rho=run.h.rho, gamma=run.h.gamma)
    return sam_optax.coupled_wsam(run.base, rho=run.h.rho, gamma=run.h.gamma)


def reference_look_sam(run: Run, phase: int = 0):
    h = run.h
    return references.look_sam(
        *run.inputs, ball(run), alpha=h.alpha, k=h.k, phase=phase, eps=run.guard
    )


def library_late_look_sam(run: Run):
    """Ascends at the last step of every k, and is the base optimizer before the first of them."""
    last = policies.Policy(
        lambda params: (), lambda g, step, state: ((step + 1) % run.h.k == 0, state)
    )
    return sam_optax.sharpness_aware(
        run.base,
        perturbations.steepest_ascent(run.h.rho),
        surrogates.reuse_orthogonal(run.h.alpha),
        last,
    )


def reference_ae_sam(run: Run):
    h, decisions = run.h, []
    yield from references.ae_sam(
        *run.inputs,
        references.ball(h.rho) if h.normalized else references.unnormalized(h.rho),
        total_steps=run.problem.steps,
        lambda_1=h.lambda_1,
        lambda_2=h.lambda_2,
        decay=h.decay,
        alpha=getattr(h, "alpha", None),
        ascended=decisions,
    )
    assert decisions == run.stored["ascended"]


def library_ae_sam(run: Run):
    """The named method where the perturbation is normalized, else parts."""
    h, total_steps = run.h, run.problem.steps
    thresholds = {"lambda_1": h.lambda_1, "lambda_2": h.lambda_2, "decay": h.decay}
    look = hasattr(h, "alpha")
    if h.normalized and look:
        return sam_optax.ae_look_sam(run.base, total_steps, h.rho, alpha=h.alpha, **thresholds)
    if h.normalized:
        return sam_optax.ae_sam(run.base, total_steps, h.rho, **thresholds)
    return sam_optax.sharpness_aware(
        run.base,
        perturbations.gradient_ascent(h.rho),
        surrogates.reuse_orthogonal(h.alpha) if look else surrogates.perturbed_gradient(),
        policies.above_gradient_norm(total_steps, **thresholds),
    )


def reference_esam(run: Run):
    return references.esam_code(
        *run.inputs[:2],
        run.problem.gradients(run.problem.perturbed_batches),
        run.inputs[2],
        rho=run.h.rho,
        masks=np.array(run.stored["mask"]),
        beta=run.h.beta,
        eps=run.guard,
    )


def library_esam(run: Run):
    """The recorded masks, then a ball of radius rho / beta; the batches know what is kept."""
    masks = run.problem.unflatten(np.array(run.stored["mask"], dtype=float))

    def update(updates, state, params=None, **extra_args):
        step = extra_args["step"]
        return jax.tree.map(lambda g, m: g * jnp.asarray(m)[step], updates, masks), state

    recorded_mask = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    return sam_optax.sharpness_aware(
        run.base,
        optax.chain(recorded_mask, perturbations.steepest_ascent(run.h.rho / run.h.beta)),
    )


def noise(run: Run) -> np.ndarray:
    return np.array(run.stored["noise"])


def library_random_weight_perturbation(run: Run):
    """The recorded noise, which displaces the first step, too."""
    recorded = run.problem.unflatten(noise(run))

    def at(step):
        return jax.tree.map(lambda x: jnp.asarray(np.append(x, x[:1] * 0, axis=0))[step], recorded)

    def update(updates, state, params=None, **extra_args):
        return at(extra_args["step"]), state

    part = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = sam_optax.one_gradient(run.base, part)
    return optax.GradientTransformationExtraArgs(
        lambda params: untyped(tx.init(params))._replace(displacement=at(0)), tx.update
    )


def mean_cross_entropy(logits: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def library_functional_sam(run: Run):
    tx = sam_optax.sam(run.base, rho=run.h.rho)
    step = training.functional_step(problems.classify, mean_cross_entropy, tx)
    return problems.Trainer(tx.init, step)


def library_mesa(run: Run):
    step = training.mesa_step(problems.classify, mean_cross_entropy, run.base, **vars(run.h))
    return problems.Trainer(step.init, step)


def library_weighted(run: Run, weight_of: np.ndarray, loss_of: np.ndarray):
    """Of every class, the weight, and a factor of its losses."""
    tx = sam_optax.sam(run.base, rho=run.h.rho)

    def losses(params, x, y):
        logits = problems.classify(params, x)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.asarray(loss_of)[y] * each

    step = training.weighted_sharpness_step(losses, tx, lambda x, y: jnp.asarray(weight_of)[y])
    return problems.Trainer(tx.init, step)


def reference_weighted(run: Run, weight_of: np.ndarray, loss_of: np.ndarray):
    start, networks, base = run.network_inputs
    labels = run.problem.batches[1]
    networks = [
        network._replace(slope=lambda z, f=network.slope, y=y: loss_of[y][:, None] * f(z))
        for network, y in zip(networks, labels, strict=True)
    ]
    yield from references.weighted_sharpness(
        start, networks, base, ball(run), [weight_of[y] for y in labels]
    )


def tail_classes(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """ImbSAM's weights, and the factor with which its code counts the tail's losses."""
    tail = np.isin(np.arange(4), run.h.tail_classes)
    return tail.astype(float), np.where(tail, run.h.tail_factor, 1.0)


def rare_classes(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Focal-SAM's weights."""
    counts = np.array(run.h.class_counts)
    return run.h.sharpness * (1 - counts / counts.sum()) ** run.h.gamma, np.ones(4)


def recorded(update: Callable) -> Any:
    """A perturbation from ``update(g, params, step)``, for what a run recorded."""
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, **extra: (
            update(updates, params, extra["step"]),
            state,
        ),
    )


def apply(part: optax.GradientTransformation, g: Any, **keywords: Any) -> Any:
    """A stateless part's displacement."""
    return untyped(part).update(g, part.init(g), **keywords)[0]


def at_step(run: Run, numbers: Any) -> Callable:
    """``step -> tree`` of what is recorded for every step."""
    tree = run.problem.unflatten(np.array(numbers, dtype=float))
    return lambda step: jax.tree.map(lambda x: jnp.asarray(x)[step], tree)


def shapes(run: Run) -> list[tuple]:
    return [np.shape(x) for x in jax.tree.leaves(run.problem.params)]


def library_zsharp(run: Run):
    """Their radius for every matrix, and for vectors a piece of SAM's displacement."""
    ascent = perturbations.steepest_ascent(run.h.rho)
    alone = optax.chain(perturbations.keep_largest(run.h.share, center=True), ascent)

    def update(g, params, step):
        return jax.tree.map(
            lambda x, whole: apply(alone, x) if x.ndim > 1 else whole, g, apply(ascent, g)
        )

    return sam_optax.sharpness_aware(run.base, recorded(update))


def library_xsam(run: Run):
    h = run.h
    ascent = perturbations.repeated(perturbations.steepest_ascent(h.rho / h.num_steps), h.num_steps)
    rule = surrogates.spherical(scheduled(h.alpha))
    if h.num_steps > 1:
        return sam_optax.sharpness_aware(run.base, ascent, rule)
    return sam_optax.xsam(run.base, h.rho, h.alpha)


def reference_gam(run: Run):
    h = run.h
    betas = (h.beta_1, h.beta_2, h.beta_3)
    return references.gam(
        *run.inputs, rho=h.rho, norm_rho=h.norm_rho, betas=betas, gamma=h.gamma, eps=run.guard
    )


def vectors(run: Run) -> list:
    return [
        None if run.stored["vector"][i] is None else np.array(run.stored["vector"][i])
        for i in run.stored["which"]
    ]


def library_eigen_sam(run: Run):
    """Until there is a vector, their perturbation is the gradient, not normalized."""
    known = [v is not None for v in vectors(run)]
    filled = [np.zeros(run.problem.start.size) if v is None else v for v in vectors(run)]
    direction = at_step(run, filled)
    tilted = sam_optax.eigen_sam(run.base, run.h.rho, run.h.alpha).parts.method.perturbation

    def update(g, params, step):
        tilt = apply(tilted, g, direction=direction(step))
        return jax.tree.map(
            lambda x, y: jnp.where(jnp.asarray(known)[step], x, run.h.rho * y), tilt, g
        )

    return sam_optax.sharpness_aware(run.base, recorded(update))


def library_sparse_sam(run: Run):
    mask = at_step(run, run.stored["mask"])
    part = sam_optax.sparse_sam(run.base, run.h.rho).parts.method.perturbation
    update = recorded(lambda g, params, step: apply(part, g, ascent_mask=mask(step)))
    return sam_optax.sharpness_aware(run.base, update)


def library_m_rwp(run: Run):
    displacement = at_step(run, run.stored["noise"])
    rule = sam_optax.m_rwp(run.base, jax.random.key(0), alpha=run.h.alpha).parts.method.surrogate
    part = recorded(lambda g, params, step: displacement(step))
    return sam_optax.sharpness_aware(run.base, part, rule)


def groups_of(run: Run) -> list[list[references.Gradient]]:
    """For every step, the gradients on the groups of its batch."""
    parts = run.problem.shards(run.h.groups)
    return [
        [run.problem.gradient(jax.tree.map(lambda x: x[t, i], parts)) for i in range(run.h.groups)]  # noqa: B023
        for t in range(run.problem.steps)
    ]


def reference_bayesian_sam(run: Run):
    h = run.h
    return references.bayesian_sam(
        run.problem.start,
        groups_of(run),
        lr=h.learning_rate,
        rho=h.rho,
        beta_1=h.beta_1,
        beta_2=h.beta_2,
        delta=h.prior_precision / h.num_data,
        damping=h.damping,
        init=h.init_precision,
        num_data=h.num_data,
        noise=untyped(np.array(run.stored["noise"])),
    )


def library_bayesian_sam(run: Run):
    """The recorded noise, and every group of the batch as a shard."""
    settings = vars(run.h) | {"key": jax.random.key(0), "axis_name": "groups"}
    del settings["groups"]
    tx = untyped(sam_optax.bayesian_sam)(**settings)
    noise_at = at_step(run, run.stored["noise"])

    def draw(key, step, params, axes):
        return jax.tree.map(lambda x: x[jax.lax.axis_index("groups")], noise_at(step))

    def update(updates, state, params=None, **extra):
        batch = jax.tree.map(lambda x: jnp.asarray(x)[state.step], run.problem.shards(run.h.groups))

        def on_a_group(part):
            grad_fn = jax.grad(lambda p: run.problem.loss(p, part))
            return tx.update(updates, state, params, grad_fn=grad_fn)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bayesian, "_draw", draw)
            return jax.vmap(on_a_group, axis_name="groups", out_axes=None)(batch)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@dataclass(frozen=True)
class Row:
    """How to reproduce a file, and how far guards that the reference leaves out may carry."""

    reference: Callable[[Run], Any]
    library: Callable[[Run], Any]
    left_out: float = 0.0


SAM = Row(
    lambda run: references.sam(*run.inputs, ball(run)),
    lambda run: sam_optax.sam(run.base, rho=run.h.rho),
)
ROWS = {
    "ae_look_sam__paper-transcription": Row(reference_ae_sam, library_ae_sam),
    "ae_sam__paper-transcription": Row(reference_ae_sam, library_ae_sam),
    "asam__SamsungLabs": Row(
        lambda run: references.sam(
            *run.inputs,
            references.adaptive_ball(run.h.rho, run.h.eta, run.problem.weights, run.guard),
        ),
        lambda run: sam_optax.asam(run.base, rho=run.h.rho, eta=run.h.eta),
    ),
    # Its scale is |w| on every leaf, biases too.
    "asam__davda54": Row(
        lambda run: references.sam(
            *run.inputs,
            references.adaptive_ball(run.h.rho, 0.0, np.ones_like(run.problem.weights), run.guard),
        ),
        lambda run: sam_optax.sharpness_aware(
            run.base, perturbations.steepest_ascent(run.h.rho, scale=absolute_values)
        ),
    ),
    "base__torch": Row(
        lambda run: references.descent(*run.inputs),
        lambda run: sam_optax.sam(run.base, rho=0.0),
    ),
    "bayesian_sam__team-approx-bayes": Row(reference_bayesian_sam, library_bayesian_sam),
    "cr_sam__TrustAIoT": Row(
        lambda run: references.cr_sam(*run.inputs, ball(run), gamma=run.h.gamma, beta=run.h.beta),
        lambda run: sam_optax.cr_sam(run.base, run.h.rho, run.h.gamma, run.h.beta),
    ),
    # Before its first vector it perturbs by the gradient itself.
    "eigen_sam__RitianLuo": Row(
        lambda run: references.eigen_sam(
            *run.inputs, rho=run.h.rho, alpha=run.h.alpha, vectors=vectors(run), eps=run.guard
        ),
        library_eigen_sam,
    ),
    # It draws masks per tensor, and puts them in front of the norm.
    "esam__dydjw9": Row(reference_esam, library_esam),
    "fisher_sam__johnjaejunlee95": Row(
        lambda run: references.sam(
            *run.inputs, references.fisher_ball(run.h.rho, run.h.eta, run.guard)
        ),
        lambda run: sam_optax.fisher_sam(run.base, rho=run.h.rho, eta=run.h.eta),
    ),
    "focal_sam__scongl": Row(
        lambda run: reference_weighted(run, *rare_classes(run)),
        lambda run: library_weighted(run, *rare_classes(run)),
    ),
    # The authors' code subtracts the average before this step's gradient entered: ema="previous".
    "friendly_sam__nblt": Row(
        lambda run: references.friendly_sam_previous(
            *run.inputs, ball(run), sigma=run.h.sigma, decay=run.h.decay
        ),
        lambda run: sam_optax.friendly_sam(
            run.base, rho=run.h.rho, sigma=run.h.sigma, decay=run.h.decay, ema="previous"
        ),
    ),
    "friendly_sam__paper-transcription": Row(
        lambda run: references.friendly_sam(
            *run.inputs, ball(run), sigma=run.h.sigma, decay=run.h.decay
        ),
        lambda run: sam_optax.friendly_sam(
            run.base, rho=run.h.rho, sigma=run.h.sigma, decay=run.h.decay
        ),
    ),
    "functional_sam__paper-transcription": Row(
        lambda run: references.functional_sam(*run.network_inputs, ball(run)),
        library_functional_sam,
    ),
    "gam__xxgege": Row(
        reference_gam, lambda run: sam_optax.gam(run.base, **vars(run.h)), left_out=1e-12
    ),
    "gnp__zhaoyang-0204": Row(
        lambda run: references.gnp(*run.inputs, ball(run), alpha=run.h.alpha),
        lambda run: sam_optax.gnp(run.base, rho=run.h.rho, alpha=run.h.alpha),
    ),
    # It guards only some of the norms that the reference guards.
    "gsam__big_vision": Row(reference_gsam, library_gsam, left_out=1e-12),
    "gsam__juntang-zhuang": Row(reference_gsam, library_gsam),
    # It counts the losses of the classes that it perturbs twice.
    "imb_sam__cool-xuan": Row(
        lambda run: reference_weighted(run, *tail_classes(run)),
        lambda run: library_weighted(run, *tail_classes(run)),
    ),
    "le_sam__paper-transcription": Row(
        lambda run: references.sam(
            *run.inputs, references.equated_ball(run.h.sigma, run.h.rho_max)
        ),
        lambda run: sam_optax.le_sam(run.base, run.h.sigma, run.h.rho_max),
    ),
    # Its norms are sqrt(x + 1e-12), which matters where the orthogonal component is small.
    "look_sam__johnjaejunlee95": Row(
        lambda run: reference_look_sam(run, phase=run.h.k - 1), library_late_look_sam, left_out=1e-9
    ),
    "look_sam__paper-transcription": Row(
        reference_look_sam,
        lambda run: sam_optax.look_sam(run.base, rho=run.h.rho, alpha=run.h.alpha, k=run.h.k),
    ),
    # It works per tensor; these runs have one tensor.
    "look_sam__rollovd": Row(
        reference_look_sam,
        lambda run: sam_optax.look_sam(run.base, rho=run.h.rho, alpha=run.h.alpha, k=run.h.k),
    ),
    # Its adaptive form: the noise at each step is given.
    "m_rwp__nblt": Row(
        lambda run: references.m_rwp(
            *run.inputs[:2],
            run.problem.gradients(run.problem.perturbed_batches),
            run.inputs[2],
            noise=lambda w, t: noise(run)[t],
            alpha=run.h.alpha,
        ),
        library_m_rwp,
    ),
    "mesa__AngusDujw": Row(
        lambda run: references.mesa(*run.network_inputs, **vars(run.h)), library_mesa
    ),
    "momentum_sam__MarlonBecker": Row(
        lambda run: references.momentum_sam(
            *run.inputs, rho=run.h.rho, momentum=run.h.momentum, eps=run.guard
        ),
        lambda run: sam_optax.momentum_sam(run.base, run.h.rho, run.h.momentum),
    ),
    # Their noise at each step is given: one of the two runs shrinks it by past gradients (ARWP).
    "random_weight_perturbation__nblt": Row(
        lambda run: references.random_weight_perturbation(
            *run.inputs, noise=lambda w, t: noise(run)[t]
        ),
        library_random_weight_perturbation,
    ),
    "sagm__Wang-pengfei": Row(
        lambda run: references.gnp(
            *run.inputs, references.blended_ball(run.h.rho, -run.h.alpha, run.guard), alpha=0.5
        ),
        lambda run: sam_optax.sagm(run.base, run.h.rho, run.h.alpha),
    ),
    "sam__SamsungLabs": SAM,
    "sam__davda54": SAM,
    "sam__google-research": SAM,
    "sam__optax": SAM,
    "single_step_sam__jjsrf": Row(
        lambda run: references.one_gradient(*run.inputs, ball(run)),
        lambda run: sam_optax.single_step_sam(run.base, run.h.rho),
    ),
    # The masks that it used are given.
    "sparse_sam__Mi-Peng": Row(
        lambda run: references.sparse_sam(
            *run.inputs, ball(run), masks=np.array(run.stored["mask"], dtype=float)
        ),
        library_sparse_sam,
    ),
    "stable_sam__cltan023": Row(
        lambda run: references.stable_sam(*run.inputs, ball(run), eps=run.guard),
        lambda run: sam_optax.stable_sam(run.base, rho=run.h.rho),
    ),
    "stable_usam__cltan023": Row(
        lambda run: references.stable_sam(
            *run.inputs, references.unnormalized(run.h.rho), eps=run.guard
        ),
        lambda run: sam_optax.sharpness_aware(
            run.base,
            perturbations.gradient_ascent(run.h.rho),
            surrogates.renormalized(surrogates.perturbed_gradient()),
        ),
    ),
    "unified_sam__dimitris-oik": Row(
        lambda run: references.unified_sam(
            *run.inputs, rho=run.h.rho, lam=scheduled(run.h.lam), eps=run.guard
        ),
        lambda run: sam_optax.unified_sam(run.base, run.h.rho, scheduled(run.h.lam)),
    ),
    "usam__cltan023": Row(
        lambda run: references.sam(*run.inputs, references.unnormalized(run.h.rho)),
        lambda run: sam_optax.sharpness_aware(run.base, perturbations.gradient_ascent(run.h.rho)),
    ),
    "vasso__BingcongLi": Row(
        lambda run: references.vasso(*run.inputs, ball(run), theta=run.h.theta),
        lambda run: sam_optax.vasso(run.base, rho=run.h.rho, theta=run.h.theta),
    ),
    "wsam__atorch": Row(reference_wsam, library_wsam),
    "xsam__Cccjl219": Row(
        lambda run: references.xsam(
            *run.inputs,
            rho=run.h.rho,
            alpha=scheduled(run.h.alpha),
            steps=run.h.num_steps,
            eps=run.guard,
        ),
        library_xsam,
        left_out=1e-12,
    ),
    # It gives every matrix the whole radius.
    "zsharp__YUNBLAK": Row(
        lambda run: references.sam(
            *run.inputs, references.z_balls(run.h.rho, run.h.share, shapes(run), run.guard)
        ),
        library_zsharp,
    ),
}


def test_every_file_has_its_row():
    assert list(ROWS) == list(FILES)


@pytest.mark.parametrize(("code", "case"), RUNS)
def test_reference(code, case):
    run, row = Run(code, case), ROWS[code]
    followed = problems.stacked(run.problem, row.reference(run))
    run.check(followed, slack=row.left_out)


@pytest.mark.parametrize(("code", "case"), RUNS)
def test_library(code, case):
    """The library adds nothing to a norm: it stays a few of the source's guards away."""
    run, row = Run(code, case), ROWS[code]
    method = row.library(run)
    follow = problems.follow_step if isinstance(method, problems.Trainer) else problems.follow
    params, info = jax.jit(lambda: follow(run.problem, method)[1])()
    run.check(params, slack=row.left_out + 10 * run.guard)
    if "ascended" in run.stored:
        assert info.ascended.tolist() == run.stored["ascended"]
