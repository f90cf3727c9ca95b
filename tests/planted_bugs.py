"""Plants one bug after the other in a copy of the package, and says which test turns red.

    python tests/planted_bugs.py              all of them, two at a time
    python tests/planted_bugs.py merge soft   those whose name contains one of these words

A change of the code that moves a line of the table changes the table too; a test looks whether each still fits.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: str  # where a test should turn red


SOFTMAX, COMPOSE, CHECKS = "_softmax.py", "_compose.py", "_checks.py"
SHARED, TOKENS, CLASSES = "_loops/shared.py", "_loops/over_tokens.py", "_loops/over_classes.py"
NUMBERS, PARITY, LINEAR, ELSEWHERE = (
    "test_softmax.py",
    "test_reference_parity.py",
    "test_linear.py",
    "test_elsewhere.py",
)
REFERENCE, KNOWN = "_loops/accelerator.py", "test_known_reference.py"
MESH, LAYOUT, PROJECTION, DEVICES, SHARDED = (
    "_mesh.py",
    "_layout.py",
    "_linear.py",
    "_loops/across_devices.py",
    "test_sharded.py",
)
DISTILL, DISTILLED = "_loops/distill.py", "test_distillation.py"
LOSSES, TOKEN = "_losses.py", "test_log_probs.py"
NUMERICS, PROMISES, PROPERTIES = "test_numerics.py", "test_promises.py", "test_properties.py"

BUGS = [
    # The numbers of an example, and how parts merge.
    Bug("sign of the gap", SOFTMAX, "u * (m - x)), mass=u", "u * (x - m)), mass=u", PARITY),
    Bug("log_z - x_y", SOFTMAX, "nll=gap + mass * log_sum", "nll=(gap - m) + (m + mass * log_sum)", NUMERICS),
    Bug("sign in the entropy", SOFTMAX, "entropy = log_sum - total", "entropy = log_sum + total", "test_stats.py"),
    Bug("0·inf of an impossible class", SOFTMAX, "jnp.where(u == 0, 0, u * (m - x))", "u * (m - x)", NUMBERS),
    Bug("impossible class has a share of smoothing", SOFTMAX, "jnp.where(x == -jnp.inf, 0, class_weight", "jnp.where(x == 0, 0, class_weight", NUMBERS),
    Bug("merge adds sums of exponentials as they are", SOFTMAX, "total(scale * exp)", "total(exp)", NUMBERS),
    Bug("merge keeps the gaps", SOFTMAX, "part.gap + part.mass * rise", "part.gap", NUMBERS),
    Bug("merge keeps the entropy's sums", SOFTMAX, "jnp.where(scale == 0, 0, rise) * exp", "0 * exp", NUMBERS),
    Bug("a row that is all -inf isn't NaN", SOFTMAX, "sums.maximum == -jnp.inf, jnp.nan, jnp.log", "sums.maximum == -jnp.inf, 0, jnp.log", NUMERICS),
    Bug("a bad label isn't NaN", SOFTMAX, "jnp.where(target < 0, jnp.nan, jnp.ones_like(gap))", "jnp.ones_like(gap)", ELSEWHERE),
    Bug("numbers of an example left out", SOFTMAX, "return keep(live, stats), (", "return stats, (", PARITY),
    # Their gradient.
    Bug("gradient without the target", SOFTMAX, "g.nll * normalizer.target_mass * p - g.nll * t", "g.nll * normalizer.target_mass * p", PARITY),
    Bug("gradient of zeros", SOFTMAX, "dlogits, dsoftcap = pull(dx)", "dlogits, dsoftcap = pull(0 * dx)", PARITY),
    Bug("targets are assumed to sum to one", SOFTMAX, "g.nll * normalizer.target_mass * p - g.nll * t", "g.nll * p - g.nll * t", PARITY),
    Bug("gradient of an example left out", SOFTMAX, "dx, dtarget, dweight = keep(live, ", "dx, dtarget, dweight = keep(None, ", PROPERTIES),
    Bug("NaN reaches the gradient of the cap", SOFTMAX, "logits if softcap is None else keep(live, logits)", "logits", NUMERICS),
    Bug("soft cap isn't differentiated", SOFTMAX, "dlogits, dsoftcap = pull(dx)", "dlogits, dsoftcap = dx, pull(dx)[1]", ELSEWHERE),
    Bug("soft cap revives an impossible class", SOFTMAX, "cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -jnp.inf)", "cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -cap)", NUMBERS),
    Bug("probabilities have no gradient", SOFTMAX, "dtarget += g.nll * surprise", "dtarget += 0 * surprise", PARITY),
    Bug("class weights have no gradient by smoothing", SOFTMAX, "dweight += g.smooth_nll * surprise", "dweight += 0 * surprise", PARITY),
    Bug("sign of the entropy's gradient", SOFTMAX, "(surprise - normalizer.entropy)", "(normalizer.entropy - surprise)", NUMBERS),
    Bug("log_softmax of a masked class has a gradient", SOFTMAX, "g = jnp.where(log_p == -jnp.inf, 0, g)", "g = g + 0", NUMERICS),
    # From the numbers to a loss.
    Bug("smoothing adds to the whole nll", COMPOSE, "(1 - epsilon) * loss", "loss", PARITY),
    Bug("smoothing isn't over the classes' number", COMPOSE, "epsilon / num_classes", "epsilon", PARITY),
    Bug("z-loss isn't squared", COMPOSE, "stats.log_z**2", "stats.log_z", PARITY),
    Bug("mean over all examples", COMPOSE, "total(live.sum(), axes).astype(losses.dtype)", "jnp.asarray(live.size, losses.dtype)", PROPERTIES),
    Bug("divisor without class weights", COMPOSE, "return ExampleWeights(sample, times(sample, of_class))", "return ExampleWeights(sample, sample)", PARITY),
    Bug("mean over nothing", COMPOSE, "jnp.where(empty, 0, total / jnp.where(empty, 1, weight))", "total / weight", ELSEWHERE),
    Bug("bad labels are clamped", CHECKS, "jnp.where(valid, labels.astype(jnp.int32), jnp.where(fine, 0, -1))", "jnp.clip(labels.astype(jnp.int32), 0, num_classes - 1)", ELSEWHERE),
    Bug("ignore_index is forgotten", CHECKS, "live = kept if live is None else kept & live", "live = live", PARITY),
    # The loops.
    Bug("the rest after the last whole chunk", SHARED, "if rest or not whole:", "if not whole:", LINEAR),
    Bug("all tokens have the first one's cotangent", SHARED, "inputs.live, normalizer, cotangents\n    )\n    # In", "inputs.live, normalizer, jax.tree.map(lambda g: jnp.broadcast_to(g[:1], g.shape), cotangents)\n    )\n    # In", LINEAR),
    Bug("logit gradients stay in float32", SHARED, "gradients.logits.astype(matmul_dtype(inputs.hidden, inputs.kernel))", "gradients.logits", LINEAR),
    Bug("NaN of a token left out meets a matmul", SHARED, "hidden=jnp.where(inputs.live[:, None], inputs.hidden, 0)", "hidden=1 * inputs.hidden", LINEAR),
    Bug("tokens: each chunk starts its sums anew", TOKENS, "return (add(sums, shares), add(", "return (shares, add(", LINEAR),
    Bug("tokens: padded classes count", TOKENS, "lax.slice_in_dim(inputs.kernel, 0, config.columns, axis=axis)", "inputs.kernel", LINEAR),
    Bug("tokens: sums over chunks in 16 bits", TOKENS, "zeros(inputs.kernel, wanted.kernel, dtype)", "zeros(inputs.kernel, wanted.kernel)", LINEAR),
    Bug("classes: a slab's classes count from 0", CLASSES, "look(config, None, slab, Projection(config).logits(slab), start)", "look(config, None, slab, Projection(config).logits(slab), 0)", LINEAR),
    Bug("classes: gradients' classes count from 0", CLASSES, "inputs, x, normalizer, cotangents, start)", "inputs, x, normalizer, cotangents, 0)", LINEAR),
    Bug("classes: the first slab twice", CLASSES, "see(seen.sums.maximum, start + size, width, room)", "see(seen.sums.maximum, start, width, room)", LINEAR),
    Bug("classes: gradients without the cotangent", CLASSES, "(scale * part).astype(whole.dtype)", "part.astype(whole.dtype)", LINEAR),
    Bug("classes: predicted by the last slab", CLASSES, "jnp.where(ahead, b.predicted, a.predicted)", "b.predicted", LINEAR),
    Bug("room: logits of the wrong tokens", "_loops/cpu_room.py", "logits[: self.tokens]", "logits[-self.tokens :]", LINEAR),
    # A reference that is known before the logits.
    Bug("reference: the redo is left out", REFERENCE, "lax.cond(far, lambda: look(m, *arrays).sums.total, lambda: seen.sums.total)", "seen.sums.total", KNOWN),
    Bug("reference: the first slab is made again for a later one", CLASSES, "take_slab(config, inputs, start, size), start)", "take_slab(config, inputs, start * (reference is None), size), start)", KNOWN),
    Bug("reference: made again relative to the same number", REFERENCE, "jnp.where(far, finite(maximum), finite(reference))", "finite(reference)", KNOWN),
    Bug("reference: one token far is none", REFERENCE, "(maximum - reference > FAR).any()", "(maximum - reference > FAR).all()", KNOWN),
    Bug("reference: impossible classes are near", REFERENCE, "(maximum - reference > FAR)", "(maximum - finite(reference) > FAR)", KNOWN),
    Bug("reference: merged as if it were the maximum", SOFTMAX, "rise = finite(maximum) - parts.reference", "rise = finite(maximum) - finite(parts.maximum)", KNOWN),
    Bug("reference: the gradient forgets it", SOFTMAX, "jnp.exp(x - normalizer.reference)", "jnp.exp(x)", PARITY),
    Bug("reference: classes first, labels count from 0", REFERENCE, "smooth=config.smooth, first_class=class_index(config, start))", "smooth=config.smooth, first_class=0)", KNOWN),
    Bug("a kernel as it lies isn't transposed", REFERENCE, "inputs._replace(kernel=inputs.kernel.T)", "inputs._replace(kernel=inputs.kernel)", KNOWN),
    Bug("a label that is left out is a bad one", CHECKS, "jnp.where(fine, 0, -1)", "-1", "test_transformations.py"),
    Bug("blocks of tokens: the last one's share alone", CLASSES, "return (add(share, more), whole), None", "return (more, whole), None", KNOWN),
    Bug("blocks of tokens: written over each other", CLASSES, "put(whole.hidden, summed[0], (first, 0))", "put(whole.hidden, summed[0], (0, 0))", KNOWN),
    Bug("a token's targets at the first one's place", CLASSES, "put(whole.targets, per_token.targets, (first, start), scale)", "put(whole.targets, per_token.targets, (0, start), scale)", KNOWN),
    # On a mesh.
    Bug("mesh: a device's sums alone", MESH, "partial(lax.psum, axis_name=axes)) if axes else sums", "lambda part: lax.psum(part, axes) / size_along(axes)) if axes else sums", SHARDED),
    Bug("mesh: sums over one of the class axes", MESH, "partial(lax.psum, axis_name=axes)) if axes", "lambda part: lax.pmean(lax.psum(part, axes[:1]), axes[1:]) if axes[1:] else lax.psum(part, axes)) if axes", SHARDED),
    Bug("mesh: sums over the class axes twice", MESH, "partial(lax.psum, axis_name=axes)) if axes", "lambda part: lax.psum(part, axes) * size_along(axes)) if axes", SHARDED),
    Bug("mesh: relative to a device's own maximum", SOFTMAX, "rise = finite(maximum) - parts.reference", "rise = 0 * (finite(maximum) - parts.reference)", SHARDED),
    Bug("mesh: each device's classes count from 0", SHARED, "lax.axis_index(config.class_axes) * config.columns + column if config.class_axes else column", "column", SHARDED),
    Bug("mesh: each device's classes of logits count from 0", MESH, "form.sums(*inputs, first_class=lax.axis_index(axes) * classes, **options)", "form.sums(*inputs, **options)", SHARDED),
    Bug("mesh: gradients' classes of logits count from 0", MESH, "form.gradients(*inputs, first_class=lax.axis_index(axes) * classes)", "form.gradients(*inputs)", SHARDED),
    Bug("mesh: padding counts", MESH, "return first + jnp.arange(classes, dtype=jnp.int32) < num_classes", "return first + jnp.arange(classes, dtype=jnp.int32) < num_classes + 1", SHARDED),
    Bug("mesh: all devices have the first one's class weights", MESH, "lax.dynamic_slice_in_dim(padded, lax.axis_index(axes) * classes, classes)", "lax.dynamic_slice_in_dim(padded, 0 * lax.axis_index(axes), classes)", SHARDED),
    Bug("mesh: predicted by each device's own count", MESH, "index = lax.axis_index(axes) * classes + index", "index = 0 * lax.axis_index(axes) + index", SHARDED),
    Bug("mesh: the loss of one device", MESH, "return lax.psum(value, axes) if axes else value", "return lax.pmean(value, axes) if axes else value", SHARDED),
    Bug("mesh: the loss twice", MESH, "return lax.psum(value, axes) if axes else value", "return 2 * lax.psum(value, axes) if axes else value", SHARDED),
    Bug("mesh: the loss over one of the axes", MESH, "return lax.psum(value, axes) if axes else value", "return lax.pmean(lax.psum(value, axes[:1]), axes[1:]) if axes[1:] else lax.psum(value, axes) if axes else value", SHARDED),
    Bug("mesh: the mean over a device's examples", COMPOSE, "losses.size * size_along(axes)", "losses.size", SHARDED),
    Bug("mesh: the kernel's gradient of one device", DEVICES, "lax.psum_scatter(gradient, config.feature_axes", "lax.psum_scatter(gradient / size_along(config.feature_axes), config.feature_axes", SHARDED),
    Bug("mesh: the kernel's features in another order", DEVICES, "lax.all_gather(inputs.kernel, config.feature_axes, axis=axis, tiled=True)", "lax.rev(lax.all_gather(inputs.kernel, config.feature_axes, axis=axis, tiled=True), (axis,))", SHARDED),
    Bug("mesh: the kernel's gradient scattered twice", "_loops/__init__.py", 'if sums.kernel is None or config.loop == "classes":', "if sums.kernel is None:", SHARDED),
    Bug("mesh: the hidden gradient isn't summed", PROJECTION, "hidden, kernel, bias, class_weight, softcap, scale = vary_over(of_classes, axes)", "hidden, kernel, bias, class_weight, softcap, scale = vary_over(of_classes, axes)\n    hidden = hidden + lax.stop_gradient(hidden) * 0 if not config.class_axes else hidden / 2 + lax.stop_gradient(hidden) / 2", SHARDED),
    Bug("mesh: tokens gathered in another order", LAYOUT, "return lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array", "return lax.rev(lax.all_gather(array, axes, axis=dimension, tiled=True), (dimension,)) if axes else array", SHARDED),
    # Of each token, at a temperature.
    Bug("temperature: multiplied", CHECKS, "jnp.where(temperature > 0, 1 / temperature, jnp.nan)", "jnp.where(temperature > 0, temperature, jnp.nan)", TOKEN),
    Bug("temperature: before the soft cap", SOFTMAX, "return cap_logits(logits, softcap) * scale.astype(compute_dtype(logits.dtype))", "return cap_logits(logits * scale.astype(logits.dtype), softcap)", TOKEN),
    Bug("temperature: not in the gradient", SOFTMAX, "dlogits, dsoftcap, dscale = pull(gradients.logits)", "dlogits, dsoftcap, dscale = gradients.logits, *pull(gradients.logits)[1:]", TOKEN),
    Bug("temperature: no gradient of its own", SOFTMAX, "softcap=dsoftcap, scale=dscale)", "softcap=dsoftcap, scale=0 * dscale)", TOKEN),
    Bug("temperature: of the first token for all", SHARED, "take_tokens(per_token, start, size, groups)", "take_tokens((*per_token[:3], None if inputs.scale is None else jnp.broadcast_to(inputs.scale[:1], inputs.scale.shape)), start, size, groups)", TOKEN),
    Bug("temperature: 0 and below are 1", CHECKS, "jnp.where(temperature > 0, 1 / temperature, jnp.nan)", "jnp.where(temperature > 0, 1 / temperature, 1.0)", TOKEN),
    Bug("temperature: gradient of the last slab", CLASSES, "put(whole.scale, summed[1], (first,))", "put(whole.scale, per_token.scale, (first,))", TOKEN),
    Bug("temperature: NaN of a token left out", SOFTMAX, "keep(None if live is None else live[None], logits), keep(live, scale)", "keep(None if live is None else live[None], logits), scale", TOKEN),
    Bug("tokens: sign of the log-probability", LOSSES, "TokenStats(-at_least_0(stats.nll)", "TokenStats(at_least_0(stats.nll)", TOKEN),
    Bug("tokens: probabilities above 1", LOSSES, "return x + lax.stop_gradient(jnp.maximum(x, 0) - x)", "return x - 1e-7", TOKEN),
    Bug("tokens: no gradient where rounding is cut off", LOSSES, "return x + lax.stop_gradient(jnp.maximum(x, 0) - x)", "return jnp.where(x > 1e-6, x, 0)", TOKEN),
    Bug("tokens: entropy for log Z", LOSSES, "stats.log_z, at_least_0(stats.entropy))", "stats.entropy, at_least_0(stats.entropy))", TOKEN),
    # Two models.
    Bug("distillation: no factor of the temperature squared", "_distillation.py", "options.temperature**2 * losses", "options.temperature * losses", DISTILLED),
    Bug("distillation: sums aren't scaled to a larger maximum", DISTILL, "jnp.exp(self.maximum - m))", "1.0)", DISTILLED),
    Bug("distillation: 0·inf of an impossible class", DISTILL, "jnp.where(exp == 0, 0, exp * values)", "exp * values", DISTILLED),
    Bug("distillation: the reverse has the other's gradient", DISTILL, "if not reverse:\n            return g_u * q - g_expected * p", "if True:\n            return g_u * q - g_expected * p", DISTILLED),
    Bug("distillation: the reverse forgets the mean", DISTILL, "p * (1 + x - u - expected)", "p * (1 + x - u)", DISTILLED),
    Bug("distillation: the temperature isn't in the gradient", DISTILL, "dlogits, dsoftcap = pull(keep(None if slab.live is None else slab.live[:, None], gradient(x, start, size)))", "dlogits, dsoftcap = gradient(x, start, size), pull(0 * x)[1]", DISTILLED),
    Bug("distillation: likeliest classes are among the rest", DISTILL, "rest.add(without(x, place, -jnp.inf))", "rest.add(x)", DISTILLED),
    Bug("distillation: likeliest classes have the rest's gradient", DISTILL, "return without(of_rest, place, g_top)", "return of_rest", DISTILLED),
    Bug("distillation: NaN of a token left out meets a matmul", DISTILL, "clean = without_left_out(inputs)", "clean = inputs", DISTILLED),
    Bug("distillation: an index that is no class has no share", "_distillation.py", "jnp.where(indices < 0, jnp.nan, top)", "top", DISTILLED),
    # The forms.
    Bug("few classes: no derivative", "_forms/cpu_few_classes.py", "jax.tree.map(lambda row: row.sum(0), *tangents)", "jax.tree.map(lambda row: 0 * row.sum(0), *tangents)", "test_transformations.py"),
    Bug("long rows: slabs count from 0", "_forms/cpu_long_rows.py", "first_class + jnp.arange(count, dtype=jnp.int32) * (classes // count)", "first_class + jnp.zeros(count, jnp.int32)", NUMBERS),
    Bug("one pass: a label elsewhere is clamped", "_forms/cpu_one_pass.py", "inside = (index >= 0) & (index < logits.shape[0])", "inside = index == index", NUMBERS),
    Bug("one pass: an impossible class has a share", "_forms/cpu_one_pass.py", "return possible * class_weight(self.weight, x)", "return self.one * class_weight(self.weight, x)", NUMBERS),
    Bug("one pass: an impossible probability is finite", "_forms/cpu_one_pass.py", "jnp.where(gap > 1e30, jnp.inf, gap)", "gap", NUMBERS),
    Bug("one pass: sums share their inputs", "_forms/cpu_one_pass.py", "inputs = lax.optimization_barrier(inputs)", "inputs = inputs", PROMISES),
    Bug("short rows: all examples are live", "_forms/cpu_short_rows.py", "jnp.where(live, logits.shape[0], 0)", "jnp.where(live, logits.shape[0], 1)", NUMBERS),
    Bug("recomputed: the forward pass stores", "_forms/cpu_recomputed.py", "logits.dtype.itemsize == 2 or", "False or", PROMISES),
    Bug("soft cap on a GPU: the label's logit isn't capped", "_forms/gpu_soft_cap.py", "m - cap_logits(logit, softcap), 0)", "m - logit, 0)", NUMBERS),
    Bug("one read on a GPU: exponentials of the logits themselves", "_forms/gpu_one_read.py", "terms(x, m, target", "terms(x, 0 * m, target", NUMBERS),
    Bug("predicted shares the logits", "_forms/__init__.py", "cpu=lax.optimization_barrier,", "cpu=lambda logits: logits,", PROMISES),
]  # fmt: skip


def source(root: Path, bug: Bug) -> Path:
    return root / "jaxce" / bug.file


def misfits() -> Iterator[str]:
    """The bugs whose line isn't in the source, or is there more than once."""
    for bug in BUGS:
        if source(ROOT, bug).read_text().count(bug.right) != 1:
            yield bug.name


def plant(bug: Bug) -> str | None:
    """The first test that turns red, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("jaxce", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / part, copy / part)
        path = source(copy, bug)
        path.write_text(path.read_text().replace(bug.right, bug.wrong))
        # Not by the test that compares this table with the source.
        fits = "--deselect=tests/test_promises.py::test_planted_bugs_fit_the_source"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--part=all", fits, f"tests/{bug.tests}"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(test_.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return failed.group(1) if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="plant the bugs whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: %(default)s)")
    args = parser.parse_args()
    chosen = [bug for bug in BUGS if not args.words or any(word in bug.name for word in args.words)]
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for bug, red in zip(chosen, pool.map(plant, chosen), strict=True):
            survivors += red is None
            print(f"{bug.name:48} {red or 'SURVIVED ' + bug.tests}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs turned a test red")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
