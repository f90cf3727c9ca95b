"""What the devices of a mesh do together in a loop, where each has some of the classes or of the kernel's features."""

from jax import Array, lax

from jaxce._loops.shared import Config, Inputs, Projection, Seen
from jaxce._mesh import first_largest, merge_over, size_along


def merge_devices(config: Config, seen: Seen) -> Seen:
    """What all devices of the class axes have seen together."""
    axes = config.class_axes
    predicted = first_largest(axes, seen.sums.maximum, seen.predicted, config.columns)
    return Seen(merge_over(axes, seen.sums), predicted)


def gather_features(config: Config, inputs: Inputs) -> Inputs:
    """The inputs with all features of the kernel, or of a slab of it."""
    if not config.feature_axes:
        return inputs
    axis = 1 - Projection(config).class_axis
    return inputs._replace(kernel=lax.all_gather(inputs.kernel, config.feature_axes, axis=axis, tiled=True))


def scatter_features(config: Config, gradient: Array) -> Array:
    """The sum over the devices of the gradient of the kernel, or of a slab of it; of this device's features."""
    if not config.feature_axes:
        return gradient
    axis = 1 - Projection(config).class_axis
    return lax.psum_scatter(gradient, config.feature_axes, scatter_dimension=axis, tiled=True)


def own_features(config: Config, kernel: Array) -> Array:
    """An array of the shape that this device's part of the kernel has."""
    if not config.feature_axes or config.gathers_slabs:
        return kernel
    axis = 1 - Projection(config).class_axis
    return lax.slice_in_dim(kernel, 0, kernel.shape[axis] // size_along(config.feature_axes), axis=axis)
