"""Every assertion on values, options, labels and shapes, a file each; nothing else imports chex.

Checks run where a function is traced, so they cost nothing from call to call, and raise the same in eager code and
under `jax.jit`. chex makes the assertions and our own words explain them; what chex would let through after
`chex.disable_asserts()` is refused all the same, so that nothing broadcasts silently.
"""
