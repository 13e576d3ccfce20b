"""`@ultraep_compile.balance(...)`: instances of a model class compile themselves on first use."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch import nn

from ultraep_compile.backend import ultraep
from ultraep_compile.config import Options
from ultraep_compile.errors import ForwardError, OptionError
from ultraep_compile.preparation import prepare_call

Model = TypeVar("Model", bound=type[nn.Module])


@overload
def balance(model_class: Model, /) -> Model: ...


@overload
def balance(**options: Any) -> Callable[[Model], Model]: ...


def balance(model_class: Any = None, /, **options: Any) -> Any:
    """Class decorator: every instance is prepared and compiled with the `ultraep` backend at its first call.

    `@balance` alone is `@balance()`.

    Args: the fields of `Options`; wrong ones are refused when the class is defined.

    The class stays the class: state_dict keys, isinstance, subclassing, pickling and deepcopy are as without it.

        @ultraep_compile.balance(ranks=8, redundant_experts=2)
        class MyMoE(nn.Module): ...

    `ultraep_compile.pipeline` takes decorated instances too: it compiles the layers of its stages with these options.
    """
    chosen = Options.of(options)

    def decorate(cls: Model) -> Model:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise OptionError(
                f"@balance decorates subclasses of torch.nn.Module, not {cls!r}. Put it above the model's class."
            )
        plain_init, plain_setstate = cls.__init__, cls.__setstate__

        @functools.wraps(plain_init)
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **kwargs)
            _compile_at_first_call(self, chosen)

        @functools.wraps(plain_setstate)
        def setstate(self: nn.Module, state: dict[str, Any]) -> None:
            plain_setstate(self, state)
            _compile_at_first_call(self, chosen)  # pickle and deepcopy drop what was compiled

        cls.__init__, cls.__setstate__ = init, setstate  # pyright: ignore
        return cls

    return decorate if model_class is None else decorate(model_class)


_waiting: weakref.WeakKeyDictionary[nn.Module, Options] = weakref.WeakKeyDictionary()  # for their first call


def take_options(model: nn.Module) -> Options | None:
    """The options that a decorated instance would be compiled with at its first call, which then no longer compiles it: a
    pipeline compiles its layers instead. None for any other model."""
    options = _waiting.pop(model, None)
    if options is not None:
        model._compiled_call_impl = None
    return options


def _compile_at_first_call(model: nn.Module, options: Options) -> None:
    reference = weakref.ref(model)
    _waiting[model] = options

    def first_call(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        assert model is not None
        try:
            prepare_call(model, *args, **kwargs)
        except ForwardError as error:  # a call as any other: what the model raises stays what it is
            raise (error.__cause__ or error) from None
        _waiting.pop(model, None)
        model.compile(backend=functools.partial(ultraep, options=options))
        return model(*args, **kwargs)

    model._compiled_call_impl = first_call  # what nn.Module.__call__ runs; never part of the state
