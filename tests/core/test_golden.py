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
from sam_optax import perturbations, policies, surrogates, training
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
    "sam__SamsungLabs": SAM,
    "sam__davda54": SAM,
    "sam__google-research": SAM,
    "sam__optax": SAM,
    "single_step_sam__jjsrf": Row(
        lambda run: references.one_gradient(*run.inputs, ball(run)),
        lambda run: sam_optax.single_step_sam(run.base, run.h.rho),
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
    "usam__cltan023": Row(
        lambda run: references.sam(*run.inputs, references.unnormalized(run.h.rho)),
        lambda run: sam_optax.sharpness_aware(run.base, perturbations.gradient_ascent(run.h.rho)),
    ),
    "vasso__BingcongLi": Row(
        lambda run: references.vasso(*run.inputs, ball(run), theta=run.h.theta),
        lambda run: sam_optax.vasso(run.base, rho=run.h.rho, theta=run.h.theta),
    ),
    "wsam__atorch": Row(reference_wsam, library_wsam),
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
