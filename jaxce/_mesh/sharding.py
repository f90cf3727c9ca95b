"""What `sharding` takes: how arrays lie on a mesh, or which axes of a `jax.shard_map` are what."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal, TypeAlias

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AnyMesh: TypeAlias = Mesh | AbstractMesh
AxisNames: TypeAlias = str | Sequence[str]
KernelGather: TypeAlias = Literal["whole", "slabs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh:
    """How the arrays that are passed lie on a mesh.

    Each device works on its own tokens and its own classes. What crosses the mesh is a few numbers for each token, the
    gradient of the hidden states and the parts of the kernel that a device lacks, never logits.

    The axes in the batch dimensions of `logits` or `hidden` hold tokens, those in the class dimension of `logits` or
    `kernel` hold classes. The features of `hidden` are whole on each device; those of a kernel may be sharded over axes
    that hold tokens (FSDP). A spec that is left out is read from the array's type, or from the array itself; inside of
    `jax.jit` or `jax.grad`, an array on a mesh with automatic axes doesn't tell.

    Args:
      logits: how logits or log-probabilities lie, a `jax.sharding.PartitionSpec`.
      hidden: how hidden states lie; a teacher's lie as the student's do.
      kernel: how the kernel lies.
      teacher_kernel: how a teacher's kernel lies.
      mesh: a `jax.sharding.Mesh`; by default that of the arrays, or the one of `jax.set_mesh`.
      kernel_gather: what each device gathers of a kernel whose features are sharded: "whole", once before the loop;
        or "slabs", a slab of classes at a time, twice, so that it never has more of it than its own part and a slab:
        usually the least memory, for a gather more. It is always the loop over classes.

    Raises:
      TypeError: `mesh` is no mesh, or a spec no `PartitionSpec`.
      ValueError: `kernel_gather` is another word.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # as many devices as there are
      >>> lie = jaxce.OnMesh(mesh=mesh, hidden=P("data"), kernel=P("data", "model"))
      >>> hidden, kernel, labels = jnp.eye(3), jnp.array([[1.0, 2.0, 3.0]] * 3), jnp.array([2, 1, 0])
      >>> print(f"{jaxce.linear_cross_entropy(hidden, kernel, labels, sharding=lie):.4f}")
      1.4076
    """

    logits: PartitionSpec | None = None
    hidden: PartitionSpec | None = None
    kernel: PartitionSpec | None = None
    teacher_kernel: PartitionSpec | None = None
    mesh: AnyMesh | None = None
    kernel_gather: KernelGather = "whole"

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh | None):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, or None; got {type(self.mesh).__name__}: {self.mesh!r}")
        for name in ("logits", "hidden", "kernel", "teacher_kernel"):
            spec = getattr(self, name)
            if not isinstance(spec, PartitionSpec | None):
                raise TypeError(
                    f"{name} must be a jax.sharding.PartitionSpec, or None; got {type(spec).__name__}: {spec!r}"
                )
        words = ("whole", "slabs")
        if self.kernel_gather not in words:
            close = difflib.get_close_matches(str(self.kernel_gather).lower(), words, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"kernel_gather must be one of 'whole' and 'slabs'; got {self.kernel_gather!r}{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InShardMap:
    """Which axes of the `jax.shard_map` around the call hold what, where each array is what this device has of it.

    Along the axes that hold tokens, the loss is that of all devices' tokens. Along those that hold classes, each device
    has its own classes of the kernel or the logits, as many as the others, and the same tokens.

    Args:
      batch_axes: the name of the axis that holds tokens, several names, or `()` for none.
      class_axes: the name of the axis that holds classes, several names, or `()` for none.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> def local(logits, labels):
      ...     own = jaxce.InShardMap(batch_axes="data", class_axes="model")
      ...     return jaxce.cross_entropy(logits, labels, sharding=own)
      >>> loss = jax.shard_map(local, mesh=mesh, in_specs=(P("data", "model"), P("data")), out_specs=P())
      >>> print(f"{loss(jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), jnp.array([2, 1])):.4f}")
      0.9076
    """

    batch_axes: AxisNames
    class_axes: AxisNames

    def __post_init__(self) -> None:
        for name in ("batch_axes", "class_axes"):
            axes = getattr(self, name)
            if axes is None:
                raise TypeError(f"{name} must be the name of an axis, or a sequence of names; got None: () is none")
            object.__setattr__(self, name, (axes,) if isinstance(axes, str) else tuple(axes))


Sharding: TypeAlias = OnMesh | InShardMap
