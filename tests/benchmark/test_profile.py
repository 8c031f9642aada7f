"""Facts about the sums by named scope."""

import jax
import jax.numpy as jnp
import pytest

from scl_jax.benchmark.profile import seconds_by_scope
from scl_jax.training.scopes import INNER, PARTS, scope_of


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/jvp(vision)/while/body/closed_call/attention/dot_general", "vision/attention"),
        ("jit(step)/transpose(jvp(vision))/while/body/qkv/dot_general", "vision/qkv backward"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(fusion)/add", "fusion"),
        ("jit(step)/convert_element_type", "other"),
        ("jit(step)/attention/mul", "other"),
        ("jit(step)/textual/mul", "other"),
    ],
)
def test_the_scope_of_an_instruction(op_name, scope):
    assert scope_of(op_name) == scope


def test_a_profile_finds_the_scope_that_does_the_work():
    @jax.jit
    def program(x):
        with jax.named_scope("vision"):
            x = jax.lax.scan(lambda y, _: (jnp.tanh(y @ y), None), x, None, length=4)[0]
        with jax.named_scope("text"):
            return x + 1

    x = jnp.ones((768, 768))
    compiled = program.lower(x).compile()
    times = seconds_by_scope(lambda: jax.block_until_ready(compiled(x)), compiled.as_text(), steps=2)
    assert times["vision"] > times.get("text", 0) + times.get("other", 0)


def test_no_scope_is_listed_twice():
    assert len({*PARTS, *INNER}) == len(PARTS) + len(INNER)
