"""The registry that knows merge methods by name; nobody lists them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import create_model
from torch import Tensor

from pave_lightning.config import options_of
from pave_lightning.merging.base import MergeMethod, MethodOptions, StaticMethod
from pave_lightning.system.plug_ins import Registry
from pave_lightning.weights import Parameter

# Where the methods of this package lie, which import this module.
METHODS = "pave_lightning.merging.methods"
ENTRY_POINTS = "pave_lightning.methods"

_registry = Registry[MergeMethod]("merge method", METHODS, ENTRY_POINTS, command="pave methods")


def merge_method(name: str, **facts: Any) -> Callable[[Any], Any]:
    """Decorator that makes a merge method known by a name; a name can be given once.

    It goes on a class that is a `StaticMethod` or a `PerTaskMethod`, or on a function for the simple case::

        @merge_method("median", source="Sharma et al. 2024", elementwise=True)
        def median(parameter, base, vectors, *, lower: bool = False):
            'The median of the task vectors.'
            return torch.stack(list(vectors.values())).median(dim=0).values

    A function takes what `StaticMethod.merge` takes and gives the merged task vector. Its keyword-only parameters are
    the method's options, with their types and defaults; the first line of its docstring is the summary. Of a class the
    name is set and nothing else; a function is replaced by the class that is made of it.

    Third parties name the module that holds what they decorate under the entry point group ``pave_lightning.methods``.

    Args:
        name: how recipes call it.
        facts: for functions, attributes of `MergeMethod` and `StaticMethod` that differ from their defaults.

    Raises:
        ValueError: another method has the name already.
        TypeError: it is no complete merge method.
    """

    def add(method: Any) -> Any:
        kind = _class_of(name, method, facts) if inspect.isfunction(method) else method
        if not (isinstance(kind, type) and issubclass(kind, MergeMethod)) or inspect.isabstract(kind):
            raise TypeError(f"'{name}' is no complete merge method: {getattr(method, '__name__', method)!r}")
        if facts and kind is method:
            raise TypeError(f"merge method '{name}': a class says {', '.join(facts)} itself")
        if lacking := [told for told in ("summary", "source", "form") if not isinstance(getattr(kind, told, 0), str)]:
            raise TypeError(f"merge method '{name}' does not say its {', '.join(lacking)}")
        if not kind.parallel and not kind.serial_because:
            raise TypeError(f"merge method '{name}' does not say why it is not parallel; set serial_because")
        _registry.add(name, kind)
        kind.name = name
        return kind

    return add


def _class_of(name: str, function: Callable[..., Tensor], facts: Mapping[str, Any]) -> type[StaticMethod]:
    """A static method made of a function, whose keyword-only parameters are its options."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    options = {
        one.name: (
            Any if one.annotation is one.empty else one.annotation,
            ... if one.default is one.empty else one.default,
        )
        for one in parameters
        if one.kind is one.KEYWORD_ONLY
    }
    unknown = sorted(set(facts) - set(vars(MergeMethod)) - set(vars(StaticMethod)) - set(MergeMethod.__annotations__))
    if unknown:
        raise TypeError(f"merge method '{name}': a method has no {', '.join(unknown)}")

    def merge(self: StaticMethod, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        return function(parameter, base, vectors, **dict(self.options))

    told = inspect.getdoc(function)
    content = {
        **({"summary": told.splitlines()[0].rstrip(".")} if told else {}),
        **facts,
        "__doc__": told,
        "__module__": function.__module__,
        "merge": merge,
        "Options": create_model(f"{function.__name__}_options", __base__=MethodOptions, **options),  # type: ignore[call-overload]
    }
    return type(function.__name__, (StaticMethod,), content)


def known_methods() -> dict[str, type[MergeMethod]]:
    """Every known method by name: those of this package and those that installed packages register."""
    return _registry.known()


def method_named(name: str) -> type[MergeMethod]:
    """The method of that name.

    Raises:
        PaveError: no method has the name; the nearest one is told.

    Example:
        >>> method_named("ties").default_scale
        1.0
    """
    return _registry.named(name)


def make_method(name: str, options: Mapping[str, Any]) -> MergeMethod:
    """The method of that name with the given options.

    Raises:
        PaveError: the method or an option is unknown, or an option's value is not possible; all is told at once.

    Example:
        >>> make_method("ties", {"density": 0.5}).options.density
        0.5
    """
    kind = method_named(name)
    return kind(options_of(kind.Options, options, f"merge method '{name}'"))
