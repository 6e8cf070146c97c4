"""Arbitrary and damaged content for readers of files, drawn by hypothesis."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mixmo_fastai.errors import InputError

FEW_EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_read_or_rejected(read, *kinds):
    """Call a function that reads a file; check that it returns or raises a readable error."""
    try:
        read()
    except (InputError, *kinds) as error:
        message = str(error)
        assert 0 < len(message.splitlines()) <= 4, message
        return message
    return None


def mutated(content, edits):
    """Change some bytes of a file's content."""
    changed = bytearray(content)
    for position, value in edits:
        if changed:
            changed[position % len(changed)] = value
    return bytes(changed)


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["classes", "mean", "std", "image_shape", "rows", "epoch", "a"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
