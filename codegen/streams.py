"""The streaming kernels of a layer as text, to be read: for its experts over so many ranks, without a GPU.

The text that runs differs in offsets, which depend on what else lies in the pool.
"""

from __future__ import annotations

from ultraep_compile.codegen.bundle import Bundle, Part, alignment_of
from ultraep_compile.codegen.reduce import TYPES, reduce_source
from ultraep_compile.codegen.replicate import replicate_source
from ultraep_compile.codegen.row_function import RowProgram
from ultraep_compile.symmetric.pool import with_own_regions
from ultraep_compile.symmetric.regions import lay_out


def streaming_kernels(program: RowProgram, ranks: int, slots: int) -> dict[str, str]:
    """Source of `push`, `pass_on` and `pull` for a program over all experts, E a multiple of `ranks`, by name.

    Without gradients that kernels add up (fp32, bf16, fp16) there is no `pull`.
    """
    signature = program.signature
    parts = tuple(Part(spec.shape, spec.dtype) for spec in signature.params)
    bundle = Bundle("slots", ranks, signature.masters // ranks, slots, parts)
    trained = tuple(p for p in parts if p.dtype in TYPES)
    grads = Bundle("slot_grads", ranks, bundle.masters, slots, trained)
    regions = with_own_regions(bundle.replicate_regions() | grads.reduce_regions(), ranks)
    offsets = {name: place.offset for name, place in lay_out(regions)[0].items()}
    alignments = [alignment_of(p.nbytes) for p in parts]
    texts = {
        "push": replicate_source(bundle, offsets, alignments, relay=False),
        "pass_on": replicate_source(bundle, offsets, alignments, relay=True),
    }
    if trained:
        aligned = [alignment_of(p.nbytes) for p in trained]
        texts["pull"] = reduce_source(grads, offsets, [p.dtype for p in trained], aligned)
    return texts
