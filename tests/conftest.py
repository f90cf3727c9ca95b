"""The strict environment of every test: no implicit dtype promotion, reproducible examples."""

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile(
    "jaxce",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=12,
    # `x64` has no state that an example could leave behind.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("jaxce")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations():
    """Programs that XLA has compiled since the test began."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    # JAX offers no public way to take a listener away; this one only lets its list grow.
    return compiled
