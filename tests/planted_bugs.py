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


EXAMPLE, COMPOSE, LABELS, TWO, CHOSEN = (
    "_math/example.py",
    "_math/composition.py",
    "_math/labels.py",
    "_math/divergence.py",
    "_math/chosen.py",
)
OPTIONS, OF_LABELS = "_arguments/options.py", "_arguments/labels.py"
SCORES, PROJECTIONS = "_calls/of_scores.py", "_calls/of_projections.py"
INPUTS, CHUNKS, OF_DEVICE = "_projection/inputs.py", "_projection/chunks.py", "_projection/devices.py"
DOOR, TOKENS, CLASSES, KEPT, ONE_PASS, ON_TPU = (
    "_projection/loops/__init__.py",
    "_projection/loops/over_tokens.py",
    "_projection/loops/over_classes.py",
    "_projection/loops/cpu_kept_logits.py",
    "_projection/loops/one_pass.py",
    "_projection/loops/tpu_one_pass.py",
)
DEVICES, LAYOUT = "_mesh/devices.py", "_mesh/layout.py"
NUMBERS, PARITY, LINEAR, ELSEWHERE = (
    "test_softmax.py",
    "test_reference_parity.py",
    "test_linear.py",
    "test_elsewhere.py",
)
KNOWN, SHARDED, DISTILLED, TOKEN = (
    "test_known_reference.py",
    "test_sharded.py",
    "test_distillation.py",
    "test_log_probs.py",
)
NUMERICS, PROMISES, PROPERTIES, NEW_TERM = (
    "test_numerics.py",
    "test_promises.py",
    "test_properties.py",
    "test_composition.py",
)

BUGS = [
    # The numbers of an example, and how parts merge.
    Bug("sign of the gap", EXAMPLE, "u * (m - x)), mass=u", "u * (x - m)), mass=u", PARITY),
    Bug("log_z - x_y", EXAMPLE, "nll=gap + mass * log_sum", "nll=(gap - m) + (m + mass * log_sum)", NUMERICS),
    Bug("sign in the entropy", EXAMPLE, "entropy = log_sum - total", "entropy = log_sum + total", "test_stats.py"),
    Bug("0·inf of an impossible class", EXAMPLE, "jnp.where(u == 0, 0, u * (m - x))", "u * (m - x)", NUMBERS),
    Bug("impossible class has a share of smoothing", EXAMPLE, "jnp.where(x == -jnp.inf, 0, class_weight", "jnp.where(x == 0, 0, class_weight", NUMBERS),
    Bug("merge adds sums of exponentials as they are", EXAMPLE, "over.total(factor * exp)", "over.total(exp)", NUMBERS),
    Bug("merge keeps the gaps", EXAMPLE, "part.gap + part.mass * rise", "part.gap", NUMBERS),
    Bug("merge keeps the entropy's sums", EXAMPLE, "jnp.where(factor == 0, 0, rise) * exp", "0 * exp", NUMBERS),
    Bug("a row that is all -inf isn't NaN", EXAMPLE, "sums.maximum == -jnp.inf, jnp.nan, jnp.log", "sums.maximum == -jnp.inf, 0, jnp.log", NUMERICS),
    Bug("a bad label isn't NaN", EXAMPLE, "jnp.where(target < 0, jnp.nan, jnp.ones_like(gap))", "jnp.ones_like(gap)", ELSEWHERE),
    Bug("numbers of an example left out", LABELS, "keep(example.counts_in, stats._replace(predicted=None))", "stats", PARITY),
    # Their gradient.
    Bug("gradient without the target", EXAMPLE, "g.nll * normalizer.target_mass * p - g.nll * t", "g.nll * normalizer.target_mass * p", PARITY),
    Bug("gradient of zeros", EXAMPLE, "dlogits, dsoftcap = pull(dx)", "dlogits, dsoftcap = pull(0 * dx)", PARITY),
    Bug("targets are assumed to sum to one", EXAMPLE, "g.nll * normalizer.target_mass * p - g.nll * t", "g.nll * p - g.nll * t", PARITY),
    Bug("gradient of an example left out", EXAMPLE, "dx, dtarget, dweight = keep(counts_in, ", "dx, dtarget, dweight = keep(None, ", PROPERTIES),
    Bug("NaN reaches the gradient of the cap", EXAMPLE, "logits if softcap is None else keep(counts_in, logits)", "logits", NUMERICS),
    Bug("soft cap isn't differentiated", EXAMPLE, "dlogits, dsoftcap = pull(dx)", "dlogits, dsoftcap = dx, pull(dx)[1]", ELSEWHERE),
    Bug("soft cap revives an impossible class", EXAMPLE, "cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -jnp.inf)", "cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -cap)", NUMBERS),
    Bug("probabilities have no gradient", EXAMPLE, "dtarget += g.nll * surprise", "dtarget += 0 * surprise", PARITY),
    Bug("class weights have no gradient by smoothing", EXAMPLE, "dweight += g.smooth_nll * surprise", "dweight += 0 * surprise", PARITY),
    Bug("sign of the entropy's gradient", EXAMPLE, "(surprise - normalizer.entropy)", "(normalizer.entropy - surprise)", NUMBERS),
    Bug("log_softmax of a masked class has a gradient", EXAMPLE, "g = jnp.where(log_p == -jnp.inf, 0, g)", "g = g + 0", NUMERICS),
    # From the numbers to a loss.
    Bug("smoothing adds to the whole nll", COMPOSE, "(1 - epsilon.astype(loss.dtype)) * loss", "loss", PARITY),
    Bug("smoothing isn't over the classes' number", COMPOSE, "epsilon.astype(stats.smooth_nll.dtype) / num_classes", "epsilon.astype(stats.smooth_nll.dtype)", PARITY),
    Bug("z-loss isn't squared", COMPOSE, "stats.log_z**2)", "stats.log_z)", PARITY),
    Bug("mean over all examples", COMPOSE, "total(counts_in.sum(), axes).astype(losses.dtype)", "jnp.asarray(counts_in.size, losses.dtype)", PROPERTIES),
    Bug("divisor without class weights", COMPOSE, "return ExampleWeights(sample, times(sample, of_class))", "return ExampleWeights(sample, sample)", PARITY),
    Bug("mean over nothing", COMPOSE, "jnp.where(empty, 0, total / jnp.where(empty, 1, weight))", "total / weight", ELSEWHERE),
    Bug("bad labels are clamped", OF_LABELS, "jnp.where(valid, labels.astype(jnp.int32), jnp.where(fine, 0, -1))", "jnp.clip(labels.astype(jnp.int32), 0, num_classes - 1)", ELSEWHERE),
    Bug("ignore_index is forgotten", OF_LABELS, "counts_in = kept if counts_in is None else kept & counts_in", "counts_in = counts_in", PARITY),
    # The loops.
    Bug("the rest after the last whole chunk", CHUNKS, "if rest or not whole:", "if not whole:", LINEAR),
    Bug("all tokens have the first one's cotangent", CHUNKS, "(example_of(inputs, logits), whole_rows, cotangents)", "(example_of(inputs, logits), whole_rows, jax.tree.map(lambda g: jnp.broadcast_to(g[:1], g.shape), cotangents))", LINEAR),
    Bug("matmuls of 16 bits are in float32", INPUTS, "            return self.hidden.dtype\n", "            return compute_dtype(self.hidden.dtype)\n", LINEAR),
    Bug("NaN of a token left out meets a matmul", INPUTS, "jnp.where(counts_in, head.hidden, 0)", "1 * head.hidden", LINEAR),
    Bug("tokens: each chunk starts its sums anew", TOKENS, "return (add(sums, shares), add(", "return (shares, add(", LINEAR),
    Bug("tokens: padded classes count", TOKENS, "return cut(inputs, CLASSES, 0, plan.columns) if", "return inputs if", LINEAR),
    Bug("tokens: sums over chunks in 16 bits", INPUTS, "jnp.zeros_like(array, dtype=dtype)", "jnp.zeros_like(array)", LINEAR),
    Bug("classes: a slab's classes count from 0", ON_TPU, "sums_of(plan, slab, slab.logits(), start)", "sums_of(plan, slab, slab.logits(), 0)", LINEAR),
    Bug("classes: gradients' classes count from 0", CLASSES, "chunk_gradients(plan, wanted, block, logits, whole_rows, cotangents, start)", "chunk_gradients(plan, wanted, block, logits, whole_rows, cotangents, 0)", LINEAR),
    Bug("classes: the first slab twice", CLASSES, "sums(start + size, width, before.maximum, kept)", "sums(start, width, before.maximum, kept)", LINEAR),
    Bug("classes: gradients without the cotangent", CLASSES, "rounded(jax.tree.map(lambda gradient: factor * gradient, final), slab)", "rounded(final, slab)", LINEAR),
    Bug("classes: predicted by the last slab", EXAMPLE, "jnp.where(larger, later, first)", "later", LINEAR),
    Bug("kept: logits of the wrong tokens", KEPT, "logits[: tokens_kept(head)]", "logits[-tokens_kept(head) :]", LINEAR),
    # A reference that is known before the logits.
    Bug("reference: the redo is left out", ONE_PASS, "lax.cond(is_far, lambda: sums(m, *arrays).total, lambda: found.total)", "found.total", KNOWN),
    Bug("reference: the first slab is made again for a later one", ON_TPU, "return of_slab(plan, reference, cut_slab(plan, inputs, start, size), start)", "return of_slab(plan, reference, cut_slab(plan, inputs, start * (reference is None), size), start)", KNOWN),
    Bug("reference: made again relative to the same number", ONE_PASS, "jnp.where(is_far, finite(maximum), finite(m))", "finite(m)", KNOWN),
    Bug("reference: one token far is none", ONE_PASS, "(maximum - m > FAR).any()", "(maximum - m > FAR).all()", KNOWN),
    Bug("reference: impossible classes are near", ONE_PASS, "(maximum - m > FAR)", "(maximum - finite(m) > FAR)", KNOWN),
    Bug("reference: merged as if it were the maximum", EXAMPLE, "rise = finite(maximum) - parts.reference", "rise = finite(maximum) - finite(parts.maximum)", KNOWN),
    Bug("reference: the gradient forgets it", EXAMPLE, "jnp.exp(x - normalizer.reference)", "jnp.exp(x)", PARITY),
    Bug("reference: classes first, labels count from 0", CHUNKS, "return plan.quantity.sums(example, reference, first_class=plan.first_class(start))\n\n\ndef read", "return plan.quantity.sums(example, reference, first_class=0)\n\n\ndef read", KNOWN),
    Bug("a kernel that is laid out otherwise isn't transposed", INPUTS, "kernel=self.kernel.T, transpose", "kernel=self.kernel, transpose", KNOWN),
    Bug("a label that is left out is a bad one", OF_LABELS, "jnp.where(fine, 0, -1)", "-1", "test_transformations.py"),
    Bug("blocks of tokens: the last one's share alone", CLASSES, "return (add(share, more), gradients), None", "return (more, gradients), None", KNOWN),
    Bug("blocks of tokens: written over each other", CLASSES, "put(slab, gradients, part, tokens=first, classes=start)", "put(slab, gradients, part, classes=start)", KNOWN),
    Bug("a token's targets at the first class", CLASSES, "put(slab, gradients, part, tokens=first, classes=start)", "put(slab, gradients, part, tokens=first)", LINEAR),
    # On a mesh.
    Bug("mesh: a device's sums alone", DEVICES, "total=partial(lax.psum, axis_name=axes)", "total=lambda part: lax.psum(part, axes) / size_along(axes)", SHARDED),
    Bug("mesh: sums over one of the class axes", DEVICES, "total=partial(lax.psum, axis_name=axes)", "total=lambda part: lax.pmean(lax.psum(part, axes[:1]), axes[1:]) if axes[1:] else lax.psum(part, axes)", SHARDED),
    Bug("mesh: sums over the class axes twice", DEVICES, "total=partial(lax.psum, axis_name=axes)", "total=lambda part: lax.psum(part, axes) * size_along(axes)", SHARDED),
    Bug("mesh: relative to a device's own maximum", EXAMPLE, "rise = finite(maximum) - parts.reference", "rise = 0 * (finite(maximum) - parts.reference)", SHARDED),
    Bug("mesh: each device's classes count from 0", CHUNKS, "return first_class(self.class_axes, self.columns) + column", "return column", SHARDED),
    Bug("mesh: each device's classes of logits count from 0", SCORES, "self.quantity.sums(example, first_class=first_class(self.axes, self.classes))", "self.quantity.sums(example)", SHARDED),
    Bug("mesh: gradients' classes of logits count from 0", SCORES, "self.quantity.gradients(example, whole_row, cotangents, first_class=own)", "self.quantity.gradients(example, whole_row, cotangents)", SHARDED),
    Bug("mesh: padding counts", DEVICES, "jnp.arange(classes, dtype=jnp.int32) < num_classes", "jnp.arange(classes, dtype=jnp.int32) < num_classes + 1", SHARDED),
    Bug("mesh: all devices have the first one's class weights", DEVICES, "lax.dynamic_slice_in_dim(padded, first_class(axes, classes), classes)", "lax.dynamic_slice_in_dim(padded, 0 * lax.axis_index(axes), classes)", SHARDED),
    Bug("mesh: predicted by each device's own count", LABELS, "predicted=first_class + jnp.argmax", "predicted=0 * first_class + jnp.argmax", SHARDED),
    Bug("mesh: the loss of one device", DEVICES, "return lax.psum(value, axes) if axes else value", "return lax.pmean(value, axes) if axes else value", SHARDED),
    Bug("mesh: the loss twice", DEVICES, "return lax.psum(value, axes) if axes else value", "return 2 * lax.psum(value, axes) if axes else value", SHARDED),
    Bug("mesh: the loss over one of the axes", DEVICES, "return lax.psum(value, axes) if axes else value", "return lax.pmean(lax.psum(value, axes[:1]), axes[1:]) if axes[1:] else lax.psum(value, axes) if axes else value", SHARDED),
    Bug("mesh: the mean over a device's examples", COMPOSE, "losses.size * size_along(axes)", "losses.size", SHARDED),
    Bug("mesh: the kernel's gradient of one device", INPUTS, "lax.psum_scatter(gradient, self.feature_axes", "lax.psum_scatter(gradient / size_along(self.feature_axes), self.feature_axes", SHARDED),
    Bug("mesh: the kernel's features in another order", INPUTS, "kernel = lax.all_gather(self.kernel, self.feature_axes, axis=axis, tiled=True)", "kernel = lax.rev(lax.all_gather(self.kernel, self.feature_axes, axis=axis, tiled=True), (axis,))", SHARDED),
    Bug("mesh: the kernel's gradient isn't scattered", TOKENS, "return scatter_kernels(rounded(gradients, inputs))", "return rounded(gradients, inputs).with_heads(lambda head: head if head.kernel is None else __import__('dataclasses').replace(head, kernel=head.own_features(head.kernel)))", SHARDED),
    Bug("mesh: the hidden gradient isn't summed", OF_DEVICE, "heads=vary_over(inputs.heads, axes),", "heads=vary_over(inputs.heads, axes) if not plan.class_axes else jax.tree.map(lambda x: x / 2 + jax.lax.stop_gradient(x) / 2, vary_over(inputs.heads, axes)),", SHARDED),
    Bug("mesh: tokens gathered in another order", LAYOUT, "return lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array", "return lax.rev(lax.all_gather(array, axes, axis=dimension, tiled=True), (dimension,)) if axes else array", SHARDED),
    # Of each token, at a temperature.
    Bug("temperature: multiplied", OPTIONS, "jnp.where(temperature > 0, 1 / temperature, jnp.nan)", "jnp.where(temperature > 0, temperature, jnp.nan)", TOKEN),
    Bug("temperature: before the soft cap", EXAMPLE, "    x = cap_logits(logits, softcap)\n    if inverse_temperature is None:\n        return x\n", "    x = logits if inverse_temperature is None else logits * inverse_temperature.astype(logits.dtype)\n    if x is not None:\n        return cap_logits(x, softcap)\n", TOKEN),
    Bug("temperature: not in the gradient", LABELS, "of_logits, of_cap, of_temperature = pull(found.logits)", "of_logits, of_cap, of_temperature = found.logits, *pull(found.logits)[1:]", TOKEN),
    Bug("temperature: no gradient of its own", LABELS, "(of_temperature,), found.target", "(None if of_temperature is None else 0 * of_temperature,), found.target", TOKEN),
    Bug("temperature: of the first token for all", CHUNKS, "inverse_temperature=tuple(head.inverse_temperature for head in heads)", "inverse_temperature=tuple(head.inverse_temperature if head.inverse_temperature is None or isinstance(head.inverse_temperature, str) else jnp.broadcast_to(head.inverse_temperature[:1], head.inverse_temperature.shape) for head in heads)", TOKEN),
    Bug("temperature: 0 and below are 1", OPTIONS, "jnp.where(temperature > 0, 1 / temperature, jnp.nan)", "jnp.where(temperature > 0, 1 / temperature, 1.0)", TOKEN),
    Bug("temperature: gradient of the last slab", CLASSES, "join(jax.tree.map(lambda gradient: factor * gradient, final), add(before, sums))", "join(jax.tree.map(lambda gradient: factor * gradient, final), sums)", TOKEN),
    Bug("temperature: NaN of a token left out", EXAMPLE, "softcap, keep(counts_in, inverse_temperature))", "softcap, inverse_temperature)", TOKEN),
    Bug("tokens: sign of the log-probability", SCORES, "TokenStats(-at_least_0(stats.nll)", "TokenStats(at_least_0(stats.nll)", TOKEN),
    Bug("tokens: probabilities above 1", SCORES, "return x + lax.stop_gradient(jnp.maximum(x, 0) - x)", "return x - 1e-7", TOKEN),
    Bug("tokens: no gradient where rounding is cut off", SCORES, "return x + lax.stop_gradient(jnp.maximum(x, 0) - x)", "return jnp.where(x > 1e-6, x, 0)", TOKEN),
    Bug("tokens: entropy for log Z", SCORES, "stats.log_z, at_least_0(stats.entropy))", "stats.entropy, at_least_0(stats.entropy))", TOKEN),
    # Two models.
    Bug("distillation: no factor of the temperature squared", PROJECTIONS, "jnp.asarray(temperature, compute_dtype(head.dtype)) ** 2", "jnp.asarray(temperature, compute_dtype(head.dtype))", DISTILLED),
    Bug("distillation: sums aren't scaled to a larger maximum", TWO, "over.total(factor.x * exp_x)", "over.total(exp_x)", DISTILLED),
    Bug("distillation: 0·inf of an impossible class", TWO, "jnp.where(exp_a == 0, 0, exp_a * (a - b))", "exp_a * (a - b)", DISTILLED),
    Bug("distillation: the reverse has the other's gradient", TWO, "self.pair(dx, du)", "(du, dx)", DISTILLED),
    Bug("distillation: the reverse forgets the mean", TWO, "p * (log_ratio - divergence)", "p * log_ratio", DISTILLED),
    Bug("distillation: the temperature isn't in the gradient", TWO, "(pull(keep(counts_in, dx)) for", "((keep(counts_in, dx), *pull(keep(counts_in, dx))[1:]) for", DISTILLED),
    Bug("distillation: likeliest classes are among the rest", CHOSEN, "rest = without(x, place, -jnp.inf)", "rest = x", DISTILLED),
    Bug("distillation: likeliest classes have the rest's gradient", CHOSEN, "dx = without(dx, place, 0 if cotangents.logits is None else cotangents.logits)", "dx = dx + 0", DISTILLED),
    Bug("distillation: NaN of a token left out meets a matmul", CLASSES, "else without_left_out(inputs)\n", "else inputs\n", DISTILLED),
    Bug("distillation: an index that is no class has no share", PROJECTIONS, "jnp.where(indices < 0, jnp.nan, chosen.logits)", "chosen.logits", DISTILLED),
    # The door, the table of axes, the head and the layout.
    Bug("door: the backward pass of another loop", DOOR, "(Taken(loop), inputs, residuals)\n\n\ndef _numbers_bwd", "(Taken(over_tokens), inputs, residuals)\n\n\ndef _numbers_bwd", LINEAR),
    Bug("door: a summed loss without its cotangent", DOOR, "taken.loop.backward(plan, residuals, of_numbers, factor)", "taken.loop.backward(plan, residuals, of_numbers, 1.0)", LINEAR),
    Bug("door: the last loop that fits", DOOR, "return next(loop for loop in LOOPS.get(plan.platform, ELSEWHERE) if", "return next(loop for loop in LOOPS.get(plan.platform, ELSEWHERE)[::-1] if", "test_platform.py"),
    Bug("door: a frozen kernel has the loop of both gradients", "_projection/loops/auto.py", "if wanted.anything and not wanted.all_of(\"hidden\", \"kernel\"):", "if wanted.anything and not wanted.all_of(\"hidden\"):", "test_platform.py"),
    Bug("composition: a number is taken for unread", COMPOSE, "read |= {id(variable) for variable in jaxpr.outvars}", "read = {id(variable) for variable in jaxpr.outvars}", NEW_TERM),
    Bug("composition: the last term is left out", COMPOSE, "for term in TERMS)", "for term in TERMS[:3])", NEW_TERM),
    Bug("table: temperatures have no tokens", INPUTS, "\"inverse_temperature\": TOKENS,", "\"inverse_temperature\": \"\",", TOKEN),
    Bug("table: class weights aren't cut", INPUTS, "\"class_weight\": CLASSES,", "\"class_weight\": \"\",", LINEAR),
    Bug("table: probabilities have no classes", INPUTS, "f\"{TOKENS} {CLASSES}\" if inputs.target is not None", "f\"{TOKENS} {FEATURES}\" if inputs.target is not None", LINEAR),
    Bug("table: a transposed kernel's axes", INPUTS, "return 0 if self.transpose_kernel else 1", "return 1", LINEAR),
    Bug("head: padding of the kernel has a gradient", INPUTS, "kernel = jnp.where(jnp.expand_dims(real, 1 - self.class_axis), kernel, 0)", "kernel = kernel", SHARDED),
    Bug("head: the teacher's is the student's", PROJECTIONS, "projection.transposed[1 if of else 0]", "projection.transposed[0]", DISTILLED),
    Bug("head: a teacher that learns", PROJECTIONS, "fixed = lax.stop_gradient((arrays, teacher_softcap))", "fixed = (arrays, teacher_softcap)", DISTILLED),
    Bug("layout: hidden states lie as labels do", LAYOUT, "self._of_hidden() if FEATURES in names else self.batch", "self.batch", SHARDED),
    Bug("layout: the kernel's classes aren't gathered", LAYOUT, "array = gather(array, names.index(CLASSES), kernel.classes_gathered)", "array = array", SHARDED),
    Bug("layout: a teacher has the student's features", OF_DEVICE, "zip(axes.heads, layout.kernels, strict=False)", "zip(axes.heads, layout.kernels[:1] * 2, strict=False)", DISTILLED),
    Bug("layout: gradients lie as the work was done", LAYOUT, "specs[name]) if name in specs else array", "specs[name]) if name in () else array", SHARDED),
    Bug("layout: logits with classes last", LAYOUT, "class_axis=axis,", "class_axis=None,", SHARDED),
    # The forms.
    Bug("few classes: no derivative", "_forms/cpu_few_classes.py", "jax.tree.map(lambda row: row.sum(0), *tangents)", "jax.tree.map(lambda row: 0 * row.sum(0), *tangents)", "test_transformations.py"),
    Bug("long rows: slabs count from 0", "_forms/cpu_long_rows.py", "first_class + jnp.arange(count, dtype=jnp.int32) * (classes // count)", "first_class + jnp.zeros(count, jnp.int32)", NUMBERS),
    Bug("one pass: a label elsewhere is clamped", "_forms/cpu_one_pass.py", "inside = (index >= 0) & (index < logits.shape[0])", "inside = index == index", NUMBERS),
    Bug("one pass: an impossible class has a share", "_forms/cpu_one_pass.py", "return possible * class_weight(self.weight, x)", "return self.one * class_weight(self.weight, x)", NUMBERS),
    Bug("one pass: an impossible probability is finite", "_forms/cpu_one_pass.py", "jnp.where(gap > 1e30, jnp.inf, gap)", "gap", NUMBERS),
    Bug("one pass: sums share their inputs", "_forms/cpu_one_pass.py", "inputs = lax.optimization_barrier(inputs)", "inputs = inputs", PROMISES),
    Bug("short rows: all examples count", "_forms/cpu_short_rows.py", "jnp.where(counts_in, logits.shape[0], 0)", "jnp.where(counts_in, logits.shape[0], 1)", NUMBERS),
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
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--thorough", fits, f"tests/{bug.tests}"]
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
