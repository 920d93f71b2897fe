"""Every option of the overlap pages for TPUs is known to libtpu."""

import pytest

from tests.hardware import overlap, topologies

PLATFORM = "tpu"


@pytest.mark.parametrize(("page", "generation"), [("v5e", "v5e"), ("v5p", "v5p"), ("v6e", "v6e")])
def test_a_pages_options_are_known_and_compile(page, generation):
    lowered = overlap.fully_sharded_step(topologies.tpu(generation, 4))
    options = overlap.options(page)
    assert options
    compiled = lowered.compile(compiler_options=options)  # An unknown one raises.
    assert compiled.memory_analysis().temp_size_in_bytes > 0
