"""Which inputs feed which encoder, and where features enter: found by changing inputs and looking at what changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ultraep_compile.multimodal.anatomy import Anatomy, Group
from ultraep_compile.multimodal.calls import Calls, answers
from ultraep_compile.multimodal.division import Division
from ultraep_compile.multimodal.modules import EncoderModule
from ultraep_compile.multimodal.skeleton import Action, Left, is_state, run, variables_behind
from ultraep_compile.preparation import untouched

Features = dict[str, tuple[Tensor, ...]]


def learn_inputs(anatomy: Anatomy, batch: Mapping[str, Any]) -> tuple[str, Features]:
    """Fill in what a group of an anatomy needs to know about its inputs.

    Returns: the input whose dim 0 counts the samples, and the features of the batch.
    """
    with untouched(anatomy.model), torch.no_grad():
        features = {g.name: EncoderModule(anatomy, g)(**batch) for g in anatomy.groups}
        states = {
            g.name: [k for k, v in batch.items() if is_state(v) and _feeds(anatomy, g, batch, k)]
            for g in anatomy.groups
        }
        for group in anatomy.groups:
            mine = states[group.name]
            others = {k for keys in states.values() for k in keys} - set(mine)
            rest = {k: v for k, v in batch.items() if k not in others}  # so that no other encoder runs, and none fails
            group.keys = tuple(
                k
                for k, v in rest.items()
                if k in mine or (isinstance(v, Tensor) and not is_state(v) and _feeds(anatomy, group, rest, k))
            )
        calls = Calls(anatomy)
        entry = first_states(anatomy, batch, answers(calls(batch), anatomy.groups, features))
        for group in anatomy.groups:
            group.required = not _runs_without(anatomy, batch, group)
            changed = {**features, group.name: tuple(f * 0.5 + 1 for f in features[group.name])}
            other = first_states(anatomy, batch, answers(calls(batch), anatomy.groups, changed))
            group.placeholder = _placeholder(entry, other, batch)
    return _sample_key(anatomy, batch, len(entry)), features


def _states_behind(anatomy: Anatomy, group: Group, batch: Mapping[str, Any]) -> list[str]:
    """Inputs that features could pass a gradient to."""
    leaves = {k: v.detach().requires_grad_() for k, v in batch.items() if is_state(v)}
    with torch.enable_grad():
        made = EncoderModule(anatomy, group)(**{**batch, **{k: v.clone() for k, v in leaves.items()}})
    behind = {id(v) for v in variables_behind(made)}
    return [k for k, v in leaves.items() if id(v) in behind]


def _feeds(anatomy: Anatomy, group: Group, batch: Mapping[str, Any], key: str) -> bool:
    """Does anything that encoder and projectors return change with an input?"""
    encoder = EncoderModule(anatomy, group)
    expected = encoder.everything(batch)
    for changed in _changes(batch[key]):
        try:
            made = encoder.everything({**batch, key: changed})
        except Exception:  # a nonsense value was refused
            return True
        if len(made) != len(expected) or not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(made, expected, strict=True)
        ):
            return True
    return False


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
    return run(anatomy.model, batch, actions | {anatomy.layers[0]: leave}, anatomy.around())[1]


def _runs_without(anatomy: Anatomy, batch: Mapping[str, Any], group: Group) -> bool:
    with contextlib.suppress(Exception):
        first_states(anatomy, {k: v for k, v in batch.items() if k not in group.keys}, {})
        return True
    return False


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
    placed = [g.placeholder[0] for g in anatomy.groups if g.placeholder]
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
        d is not None and torch.allclose(torch.cat([m[i] for m in made], d), f, rtol=1e-3, atol=1e-5)
        for i, (d, f) in enumerate(zip(dims, expected, strict=True))
    )
    if same:
        group.dims = [d for d in dims if d is not None]
    return same


def _dim_of_rows(pieces: Sequence[Sequence[int]], whole: Sequence[int]) -> int | None:
    """The first dim in which sizes of pieces add up to those of the whole, and agree in all others."""
    for dim in range(len(whole)):
        others = [(*p[:dim], *p[dim + 1 :]) for p in pieces]
        if sum(p[dim] for p in pieces) == whole[dim] and all(o == (*whole[:dim], *whole[dim + 1 :]) for o in others):
            return dim
    return None
