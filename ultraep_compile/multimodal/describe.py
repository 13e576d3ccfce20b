"""The parts of a multimodal model in words, for `explain`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ultraep_compile.multimodal.anatomy import Anatomy, Stream, study
from ultraep_compile.multimodal.calls import Calls
from ultraep_compile.multimodal.cut import trace_feeds
from ultraep_compile.multimodal.inputs import learn_inputs
from ultraep_compile.multimodal.modules import EncoderModule, StageModule
from ultraep_compile.multimodal.roles import Roles
from ultraep_compile.multimodal.skeleton import nothing_silent

log = logging.getLogger(__name__)


def describe(model: nn.Module, roles: Roles, inputs: Mapping[str, Any]) -> list[str]:
    """Lines on what is which part, which inputs feed each encoder and where its features enter; none for a text model.

    Args:
        inputs: keyword arguments of a forward. Without a loss in its output only the names are told.
    """
    if not roles.encoders:
        return []
    idle = [g for g in roles.generators if g not in roles.trained]
    lines = [f"Multimodal: language model {', '.join(roles.llm)}."]
    lines += [f"  projectors: {', '.join(roles.projectors)}"] if roles.projectors else []
    lines += [f"  generators in training: {', '.join(roles.trained)}"] if roles.trained else []
    lines += [f"  not called in training, there to generate: {', '.join(idle)}"] if idle else []
    try:
        with nothing_silent(model):
            return lines + _encoders(study(model, inputs, roles), inputs)
    except Exception as reason:  # a report must not fail for a part of it
        log.info("inputs and entries of encoders are not known: %s", reason)
        return lines + [f"  encoder {name}" for name in roles.encoders]


def _encoders(anatomy: Anatomy, inputs: Mapping[str, Any]) -> list[str]:
    learn_inputs(anatomy, inputs)
    calls = Calls(anatomy)
    layers = [StageModule(anatomy, calls, i, i + 1) for i in range(len(anatomy.layers))]
    feeds = trace_feeds(anatomy, [EncoderModule(anatomy, g) for g in anatomy.groups], layers, inputs)
    return [
        f"  encoder {g.name} reads {', '.join(s.keys)}; {_entry(s, feeds[g.name])}"
        for g in anatomy.groups
        for s in g.streams
    ]


def _entry(stream: Stream, layers: tuple[int, ...]) -> str:
    where = "layers " + ", ".join(map(str, layers)) if len(layers) > 1 else f"layer {', '.join(map(str, layers))}"
    if stream.placeholder is not None:
        key, ids = stream.placeholder
        return f"features stand for {key} {', '.join(map(str, ids))} and enter at {where}"
    return f"features are read by {where}"
