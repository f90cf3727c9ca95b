"""What "auto" picks, and how many tokens or classes are worked on at a time: a rule for each platform.

N tokens, D features, C classes. The figures behind each rule are in docs/compilers.md.
"""

import math

from jaxce._loops.shared import Inputs, Loop, matmul_dtype

# On a CPU, "auto" is "tokens" for kernels of at most so many entries, whose gradient stays in the cache.
SMALL_KERNEL = 2**21
# Into how many chunks of tokens XLA's partitioner is given the loop.
MESH_CHUNKS = 4


def loop(platform: str, inputs: Inputs, reduction: str, groups: int = 1) -> Loop:
    """The loop that "auto" picks."""
    *batch, features = inputs.hidden.shape
    if groups > 1:
        # Of a slab of classes XLA may find a part on each device of a mesh: it would send the slabs around.
        return "tokens"
    if reduction == "none" or platform == "tpu":
        return "classes"
    if platform == "cpu":
        # A slab's logits stay in the cache, which makes up for the fourth matmul; the gradient of a small kernel, which
        # the loop over tokens adds to, does so too.
        return "tokens" if inputs.kernel.size <= SMALL_KERNEL else "classes"
    # The float32 gradient of the kernel is then at most a quarter of what the logits would be.
    return "tokens" if 16 * features <= math.prod(batch) * inputs.hidden.dtype.itemsize else "classes"


def tokens_at_a_time(platform: str, inputs: Inputs, columns: int, groups: int = 1) -> int:
    """How many tokens a chunk has: a power of two, so that there is seldom a rest."""
    if groups > 1:
        # Devices of a mesh may have to send each other the kernel and its gradient for each chunk.
        return -(-inputs.hidden.shape[0] // MESH_CHUNKS)
    # Each chunk reads and writes the float32 gradient of the kernel, which takes about as long as the matmuls of a few
    # hundred tokens; so a chunk may take as much memory as that gradient, and a quarter more.
    features = inputs.hidden.shape[1]
    as_the_gradient = power_of_two(5 * features // (4 + matmul_dtype(inputs.hidden, inputs.kernel).itemsize))
    if platform == "cpu":
        # And at least a million logits, below which the steps of the loop cost more than what they do.
        return max(128, as_the_gradient, power_of_two(2**20 // columns))
    # Fewer tokens are too few for the matrix units.
    return max(1024, as_the_gradient)


def classes_at_a_time(platform: str, inputs: Inputs) -> int:
    """How many classes a slab has: 8 million logits at most, but not too few for the matmuls."""
    tokens, features = inputs.hidden.shape
    bounded = power_of_two(2**23 // max(tokens, 1))
    if platform == "cpu":
        # Few tokens need wider slabs to be worth a step of the loop.
        return min(2048 if tokens <= 1024 else 1024, max(256, bounded))
    if platform == "tpu":
        # The most for which its compiler keeps the gradient of the logits on the chip.
        return max(1280 if features >= 3072 else 1152, bounded)
    return max(1024, bounded)


def classes_evaluated_at_a_time(platform: str, inputs: Inputs) -> int:
    """How many classes a slab has where no gradient is wanted."""
    # A TPU's compiler takes more memory for wider ones, which are no faster as long as the tokens aren't too many.
    narrow = platform == "tpu" and inputs.hidden.shape[0] <= 32_768
    return 768 if narrow else classes_at_a_time(platform, inputs)


def tokens_beside_a_slab(platform: str, tokens: int) -> int:
    """How many of the tokens the backward pass of a slab of classes works on at a time."""
    # All, as long as a TPU's compiler keeps the gradient of their logits on the chip.
    return 8192 if platform == "tpu" and tokens > 32_768 else max(tokens, 1)


def power_of_two(bound: int) -> int:
    """The largest power of two that is at most `bound`, or 1."""
    return 1 << max(bound.bit_length() - 1, 0)
