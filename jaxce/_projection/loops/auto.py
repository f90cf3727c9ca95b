"""What "auto" picks, and how many tokens or classes are worked on at a time: a rule for each platform.

N tokens, D features, C classes. The figures behind each rule are in docs/compilers.md.
"""

import math

from jaxce._projection.chunks import Plan
from jaxce._projection.inputs import Inputs, Wanted

# On a CPU, "auto" is "tokens" for kernels of at most so many entries, whose gradient stays in the cache.
SMALL_KERNEL = 2**21
# Into how many chunks of tokens XLA's partitioner is given the loop.
MESH_CHUNKS = 4


def takes_tokens(plan: Plan, wanted: Wanted, inputs: Inputs) -> bool:
    """Whether "auto" is the loop over tokens."""
    head = inputs.heads[0]
    if plan.token_groups > 1:
        # Of a slab of classes XLA may find a part on each device of a mesh: it would send the slabs around.
        return True
    # Over tokens, a TPU takes more memory and seldom less time, also with a matmul less.
    if not plan.summed or plan.platform == "tpu":
        return False
    # With the kernel or the hidden states frozen, two matmuls do over tokens, and three over classes.
    if wanted.anything and not wanted.all_of("hidden", "kernel"):
        return True
    if plan.platform == "cpu":
        # A slab's logits stay in the cache, which makes up for the fourth matmul; the gradient of a small kernel, which
        # the loop over tokens adds to, does so too.
        return head.kernel.size <= SMALL_KERNEL
    # The float32 gradient of the kernel is then at most a quarter of what the logits would be.
    *batch, features = head.hidden.shape
    return 16 * features <= math.prod(batch) * head.hidden.dtype.itemsize


def tokens_at_a_time(plan: Plan, inputs: Inputs) -> int:
    """How many tokens a chunk has: a power of two, so that there is seldom a rest."""
    if plan.token_groups > 1:
        # Devices of a mesh may have to send each other the kernel and its gradient for each chunk.
        return -(-inputs.tokens // MESH_CHUNKS)
    # Each chunk reads and writes the float32 gradient of the kernel, which takes about as long as the matmuls of a few
    # hundred tokens; so a chunk may take as much memory as that gradient, and a quarter more.
    head = inputs.heads[0]
    as_the_gradient = power_of_two(5 * head.hidden.shape[1] // (4 + head.dtype.itemsize))
    if plan.platform == "cpu":
        # And at least a million logits, below which the steps of the loop cost more than what they do.
        return max(128, as_the_gradient, power_of_two(2**20 // plan.columns))
    # Fewer tokens are too few for the matrix units.
    return max(1024, as_the_gradient)


def classes_at_a_time(plan: Plan, inputs: Inputs) -> int:
    """How many classes a slab has: 8 million logits at most, but not too few for the matmuls."""
    tokens, features = inputs.heads[0].hidden.shape
    bounded = power_of_two(2**23 // max(tokens, 1))
    if plan.platform == "cpu":
        # Few tokens need wider slabs to be worth a step of the loop.
        return min(2048 if tokens <= 1024 else 1024, max(256, bounded))
    if plan.platform == "tpu":
        # The most for which its compiler keeps the gradient of the logits on the chip.
        return max(1280 if features >= 3072 else 1152, bounded)
    return max(1024, bounded)


def classes_evaluated_at_a_time(plan: Plan, inputs: Inputs) -> int:
    """How many classes a slab has where no gradient is wanted."""
    # A TPU's compiler takes more memory for wider ones, which are no faster as long as the tokens aren't too many.
    narrow = plan.platform == "tpu" and inputs.tokens <= 32_768
    return 768 if narrow else classes_at_a_time(plan, inputs)


def tokens_beside_a_slab(plan: Plan, inputs: Inputs) -> int:
    """How many of the tokens the backward pass of a slab of classes works on at a time."""
    # All, as long as a TPU's compiler keeps the gradient of their logits on the chip.
    return 8192 if plan.platform == "tpu" and inputs.tokens > 32_768 else max(inputs.tokens, 1)


def zeroes_left_out_by_block(plan: Plan) -> bool:
    """Whether hidden states of tokens left out are made zeros where they are multiplied, or once before the loop."""
    # On a TPU that is a part of the matmul; elsewhere it would be a copy for each slab.
    return plan.platform == "tpu"


def power_of_two(bound: int) -> int:
    """The largest power of two that is at most `bound`, or 1."""
    return 1 << max(bound.bit_length() - 1, 0)
