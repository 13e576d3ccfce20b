"""Which inputs feed which encoder, and where features enter: found by changing inputs and looking at what changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ultraep_compile.multimodal.anatomy import Anatomy, Stream
from ultraep_compile.multimodal.calls import Calls, answers
from ultraep_compile.multimodal.division import Division
from ultraep_compile.multimodal.modules import EncoderModule, Outputs
from ultraep_compile.multimodal.reads import Reads
from ultraep_compile.multimodal.skeleton import Action, Left, is_state, run
from ultraep_compile.preparation import untouched

Features = dict[str, tuple[Tensor, ...]]


def learn_inputs(anatomy: Anatomy, batch: Mapping[str, Any]) -> tuple[str, Features]:
    """Fill in what a group of an anatomy needs to know about its inputs.

    Returns: the input whose dim 0 counts the samples, and the features of the batch.
    """
    groups = anatomy.groups
    with untouched(anatomy.model), torch.no_grad():
        encoders = {g.name: EncoderModule(anatomy, g) for g in groups}
        outputs = {name: e.outputs(batch) for name, e in encoders.items()}
        features = {name: e.features(outputs[name]) for name, e in encoders.items()}
        states = {name: _calls_behind(e, batch) for name, e in encoders.items()}
        for group in groups:
            mine = states[group.name]
            others = {k for keys in states.values() for k in keys} - set(mine)
            rest = {k: v for k, v in batch.items() if k not in others}  # so that no other encoder runs, and none fails
            integers = [k for k, v in rest.items() if isinstance(v, Tensor) and not is_state(v)]
            calls = mine | {k: _calls_that_change(encoders[group.name], rest, k) for k in integers}
            group.streams, own = _streams({k: calls[k] for k in batch if calls.get(k)})
            paths = [path for path, _ in outputs[group.name]]
            group.once = all([paths[c] for c in mine].count(path) == 1 for mine in own for path, _ in group.slots)
            known = Calls(anatomy)(batch)
            entry = first_states(anatomy, batch, answers(known, groups, features))
            learned = []
            for stream, mine in zip(group.streams, own, strict=True):
                changed = [
                    (p, [_other(x) for x in v] if c in mine else v)
                    for c, (p, v) in enumerate(outputs[group.name])
                ]
                given = {**features, group.name: encoders[group.name].features(changed)}
                placeholder = _placeholder(entry, first_states(anatomy, batch, answers(known, groups, given)), batch)
                required = placeholder is None and not _runs_without(anatomy, batch, stream.keys)
                learned.append(Stream(stream.keys, required, placeholder))
            group.streams = tuple(learned)
    return _sample_key(anatomy, batch, len(entry)), features


def _streams(calls: Mapping[str, set[int]]) -> tuple[tuple[Stream, ...], list[set[int]]]:
    """Inputs that change the same calls, in the order of these; and the calls of each."""
    graph: nx.Graph = nx.Graph([(k, c) for k, several in calls.items() for c in several])
    found = []
    for part in nx.connected_components(graph):
        mine = {c for c in part if isinstance(c, int)}
        found.append((min(mine), tuple(k for k in calls if k in part), mine))
    found.sort()
    return tuple(Stream(keys) for _, keys, _ in found), [mine for _, _, mine in found]


def _calls_behind(encoder: EncoderModule, batch: Mapping[str, Any]) -> dict[str, set[int]]:
    """State among the inputs -> calls of encoder and projectors whose outputs are made from it."""
    reads = Reads()
    with reads:
        for key, value in batch.items():
            if is_state(value):
                reads.name(value, key)
        behind = [reads.made_from(outputs) for _, outputs in encoder.outputs(batch)]
    calls = {k: {c for c, keys in enumerate(behind) if k in keys} for k in batch}
    return {k: c for k, c in calls.items() if c}


def _calls_that_change(encoder: EncoderModule, batch: Mapping[str, Any], key: str) -> set[int]:
    """Calls of encoder and projectors whose outputs change with an input, or that refuse it."""
    expected, found = encoder.outputs(batch), set()
    for changed in _changes(batch[key]):
        made: Outputs = []
        with contextlib.suppress(Exception):  # a nonsense value may be refused
            encoder.outputs({**batch, key: changed}, made)
        found |= {c for c, (a, b) in enumerate(zip(expected, made, strict=False)) if not _equal(a[1], b[1])}
        if len(made) < len(expected) and (not made or encoder.group.once):
            found.add(len(made))  # otherwise it may be where the features of another stream went in that refused
    return found


def _equal(a: list[Any], b: list[Any]) -> bool:
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if isinstance(x, Tensor)]
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _changes(value: Tensor) -> Iterator[Tensor]:
    yield torch.zeros_like(value)
    if value.numel() and bool(((value == 0) | (value == 1)).all()):
        yield 1 - value.long() if value.dtype != torch.bool else ~value
    yield value.roll(1, 0) if value.dim() else value + 1


def first_states(anatomy: Anatomy, batch: Mapping[str, Any], parts: Mapping[str, Action]) -> Tensor:
    """What the first layer is given: [samples, positions, width]."""

    def leave(own: Any, args: Any, kwargs: Any) -> Any:
        raise Left(next(x for x in pytree.tree_leaves((args, kwargs)) if is_state(x)))

    actions: dict[Any, Action] = {anatomy.part(p): a for p, a in parts.items()}
    return run(anatomy.model, batch, actions | {anatomy.layers[0]: leave})[1]


def _runs_without(anatomy: Anatomy, batch: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    with contextlib.suppress(Exception):
        first_states(anatomy, {k: v for k, v in batch.items() if k not in keys}, {})
        return True
    return False


def _other(value: Any) -> Any:
    """A tensor of other values: of codes, others that occur."""
    if is_state(value):
        return value * 0.5 + 1
    return value.max() + value.min() - value if isinstance(value, Tensor) and value.numel() else value


def _placeholder(before: Tensor, after: Tensor, batch: Mapping[str, Any]) -> tuple[str, tuple[int, ...]] | None:
    """An input whose values say where features go in: those values stand at hardly any other place."""
    where = (before != after).flatten(2).any(-1) if before.dim() > 2 else torch.zeros(0, dtype=torch.bool)
    if not where.any():
        return None
    found = []
    for key, value in batch.items():
        if not isinstance(value, Tensor) or is_state(value) or value.shape != where.shape:
            continue
        ids = value[where].unique()
        share = float(where.sum() / torch.isin(value, ids).sum())  # some stand for learned rows between features
        if int(ids.min()) >= 0 and share > 0.5:
            found.append((share, value.unique().numel(), key, tuple(ids.tolist())))
    return max(found)[2:] if found else None


def _sample_key(anatomy: Anatomy, batch: Mapping[str, Any], samples: int) -> str:
    fed = {k for g in anatomy.groups for k in g.keys}
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == samples}
    placed = [s.placeholder[0] for g in anatomy.groups for s in g.streams if s.placeholder]
    return next(iter([*placed, *(k for k in tensors if k not in fed), *tensors]), "")


def learn_items(
    anatomy: Anatomy, encoders: Sequence[EncoderModule], batch: Mapping[str, Any], sample_key: str, features: Features
) -> None:
    """The smallest piece that an encoder can run on alone, with the same features for the batch."""
    for encoder in encoders:
        group = encoder.group
        for group.item in ("row", "sample", "microbatch"):
            if group.item != "microbatch" and _same_by_pieces(
                anatomy, encoder, batch, sample_key, features[group.name]
            ):
                break


def _same_by_pieces(
    anatomy: Anatomy, encoder: EncoderModule, batch: Mapping[str, Any], sample_key: str, expected: tuple[Tensor, ...]
) -> bool:
    division = Division(batch, anatomy.groups, sample_key)
    pieces = division.encoder_items(encoder.group, range(division.samples))
    group, made = encoder.group, []
    group.dims = [0] * len(group.slots)
    with contextlib.suppress(Exception), untouched(anatomy.model), torch.no_grad():  # a piece too small may be refused
        made = [encoder(**piece) for piece in pieces]
    if not made:
        return False
    dims = [_dim_of_rows([m[i].shape for m in made], f.shape) for i, f in enumerate(expected)]
    same = all(
        d is not None and _close(torch.cat([m[i] for m in made], d), f)
        for i, (d, f) in enumerate(zip(dims, expected, strict=True))
    )
    if same:
        group.dims = [d for d in dims if d is not None]
    return same


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5) if is_state(b) else torch.equal(a, b)


def _dim_of_rows(pieces: Sequence[Sequence[int]], whole: Sequence[int]) -> int | None:
    """The first dim in which sizes of pieces add up to those of the whole, and agree in all others."""
    for dim in range(len(whole)):
        others = [(*p[:dim], *p[dim + 1 :]) for p in pieces]
        if sum(p[dim] for p in pieces) == whole[dim] and all(o == (*whole[:dim], *whole[dim + 1 :]) for o in others):
            return dim
    return None
