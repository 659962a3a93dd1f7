"""Turns one operator's Python file into an operator. The only file that touches the extension `_C`.

An operator is declared by a reference in plain PyTorch, a `fake` function that checks the contract
of shapes and dtypes and returns empty outputs, and a `plan` function that picks the route of a
call.
`define_op` registers them with `torch.library` (so that autograd, `torch.compile`, autocast and
`opcheck` see one operator) and returns a function that, in eager mode without gradients, skips the
dispatcher: it costs more than a small kernel.
"""

import ctypes
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[..., Any]


class Operator(Protocol):
    """What `define_op` returns: a function with its parts as attributes."""

    reference: Function  # plain PyTorch, the declaration
    overload: Function  # torch.ops.fastlora.<name>.default
    eager: Function  # the entry for callers that are never traced and give all arguments
    clear: Callable[[], None]  # forget the cached plans

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def share_exchange_api(extension: Any) -> None:
    """Gives an extension what turns torch's tensors into views."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(
            f"fastlora needs torch >= 2.10 (DLPack's C exchange API), got torch {torch.__version__}"
        )
    extension.set_exchange_api(capsule, Tensor, torch.nn.Parameter)


def _load_kernels() -> Any:
    try:
        kernels = importlib.import_module("fastlora._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise ImportError(
                "fastlora._C is not built; in fastlora's folder: make environment, or pip install ."
            ) from error
        if "GOMP" not in str(error) and "kmpc" not in str(error):
            raise
        # torch normally brings the OpenMP runtime into the global scope; a build of it that does
        # not leaves the system's.
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        kernels = importlib.import_module("fastlora._C")
    share_exchange_api(kernels)
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 (not in its type stub)
    # Each of these, when not idle, means that somebody has to see the operator itself. The idle
    # values are singletons and compared by identity.
    guards = [
        (torch._C._len_torch_dispatch_stack, 0),
        (torch._C._is_torch_function_mode_enabled, False),
        (functorch.maybe_current_level, None),
        (torch._C._is_any_autocast_enabled, False),
        (torch._C._get_tracing_state, None),
    ]
    kernels.set_guards(
        guards,
        vars(torch.autograd.forward_ad),
        torch.is_grad_enabled,
        torch._C._set_grad_enabled,
        Tensor.is_neg,
    )
    return kernels


kernels: Any = _load_kernels()
_library = torch.library.Library("fastlora", "DEF")
_autocast_keys = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
operators: dict[str, Operator] = {}


class ContractError(ValueError):
    """An argument breaks an operator's contract: operator, argument, expected, got."""


def expect(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raises ContractError unless `condition` holds."""
    if not condition:
        if isinstance(got, Tensor):
            got = f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
        raise ContractError(f"{op}: {argument}: expected {expected}, got {got}")


def expect_tensor(op: str, argument: str, value: object, *, optional: bool = False) -> None:
    """TypeError unless `value` is a tensor (or None where that is allowed)."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise TypeError(
            f"{op}: {argument}: expected a tensor{' or None' if optional else ''}, "
            f"got {type(value).__name__}"
        )


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates and coefficients are float32; float64 beside float64 data (for gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define_op(
    reference: Function,
    *,
    fake: Function,
    plan: Function,
    setup_context: Function | None = None,
    backward: Function | None = None,
    mutates: Sequence[str] = (),
    autocast: Sequence[str] = (),
    differentiable: bool = True,
) -> Operator:
    """Registers `reference` as operator `fastlora::<its name>` and returns its eager entry.

    - `fake(*args)` raises on a broken contract and returns empty outputs; it serves fake tensors
    and
      real ones.
    - `plan(*args)` returns the callable that computes the outputs for arguments of this signature
      (shapes, strides, dtypes, devices, alignment, ints; not the values of floats). It is
      remembered.
    - `setup_context`, `backward`: as in `torch.library.register_autograd`. Without them an operator
      is differentiated through its reference: the only way for one that mutates.
    - `autocast`: the arguments that autocast casts to its dtype.
    - `differentiable=False`: runs as under `no_grad`, whatever requires a gradient.
    """
    name = reference.__name__
    parameters = list(inspect.signature(reference).parameters.values())
    names = [p.name for p in parameters]
    mutated = [names.index(m) for m in mutates]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.fastlora, name).default

    def miss(*args: Any) -> Function:
        fake(*args)  # the contract
        route = plan(*args)
        if not mutated:
            return route

        def mutating(*args: Any) -> Any:
            result = route(*args)
            for i in mutated:
                torch.autograd.graph.increment_version(args[i])  # inference tensors have none
            return result

        return mutating

    eager, kernel, clear, plan_count = kernels.make_dispatcher(
        miss, overload, reference, differentiable
    )

    def fake_impl(*args: Any) -> Any:
        # Torch comes here also for real tensors beside one on the meta device (offloaded weights),
        # and what is returned would be uninitialised memory.
        devices = {
            t.device.type
            for a in args
            for t in (a if isinstance(a, list) else [a])
            if isinstance(t, Tensor)
        }
        mixed = "meta" in devices and len(devices) > 1
        expect(not mixed, name, "arguments", "one device", " and ".join(sorted(devices)))
        outputs = fake(*args)
        return None if mutated else outputs

    def kernel_impl(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher leaves out arguments that equal their defaults.
        bound = bind(args, kwargs) if len(args) != len(names) else args
        return kernel(*(_plain(a) for a in bound))

    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, kernel_impl, "CPU")
    _library.impl(name, kernel_impl, "CUDA")
    torch.library.register_fake(f"fastlora::{name}", fake_impl, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"fastlora::{name}", backward, setup_context=setup_context, lib=_library
        )
    elif not differentiable:
        _register_no_autograd(name, overload)
    else:
        _register_reference_autograd(name, overload, reference, fake, mutated)
    if autocast:
        _register_autocast(name, overload, [names.index(a) for a in autocast], mutated)

    indices = {parameter: i for i, parameter in enumerate(names)}
    missing = object()
    usual = [defaults.get(parameter, missing) for parameter in names]
    required = len(names) - len(defaults)

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = len(args)
        if given > len(names):
            raise TypeError(f"{name}: expected {len(names)} arguments, got {given}")
        bound = [*args, *usual[given:]]
        for parameter, value in kwargs.items():
            i = indices.get(parameter, -1)
            if i < given:
                raise TypeError(f"{name}: unexpected or repeated argument '{parameter}'")
            bound[i] = value
        for i in range(given, required):
            if bound[i] is missing:
                raise TypeError(f"{name}: missing argument '{names[i]}'")
        return bound

    def operator(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(names):
            args = tuple(bind(args, kwargs))
        if torch.compiler.is_compiling():
            return overload(*args)
        return eager(*args)

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = reference.__doc__
    operator.__module__ = reference.__module__
    operator.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    operator.reference = reference  # type: ignore[attr-defined]
    operator.eager = eager  # type: ignore[attr-defined]
    operator.overload = overload  # type: ignore[attr-defined]
    operator.clear = clear  # type: ignore[attr-defined]
    operator.plan_count = plan_count  # type: ignore[attr-defined]
    operators[name] = operator  # type: ignore[assignment]
    return operator  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    """Below the dispatcher a subclass without a dispatch of its own is its plain memory."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter):
        return value
    dispatch = getattr(type(value), "__torch_dispatch__", None)
    if dispatch is not torch._C._disabled_torch_dispatch_impl:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _register_reference_autograd(
    name: str, overload: Any, reference: Function, fake: Function, mutated: list[int]
) -> None:
    """Where anything requires a gradient the reference runs, which torch differentiates."""
    below = torch._C._after_autograd_keyset

    def autograd_impl(keyset: Any, *args: Any) -> Any:
        flat: list[Any] = []
        for a in args:
            flat.extend(a if isinstance(a, list | tuple) else [a])
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in flat):
            fake(*args)  # the contract: torch alone would broadcast
            result = reference(*args)
            return None if mutated else result
        return overload.redispatch(keyset & below, *args)

    _library.impl(name, autograd_impl, "Autograd", with_keyset=True)


def _register_no_autograd(name: str, overload: Any) -> None:
    below = torch._C._after_autograd_keyset

    def autograd_impl(keyset: Any, *args: Any) -> Any:
        with torch.no_grad():
            return overload.redispatch(keyset & below, *args)

    _library.impl(name, autograd_impl, "Autograd", with_keyset=True)


def _register_autocast(name: str, overload: Any, cast: list[int], mutated: list[int]) -> None:
    """Casts to autocast's dtype, or to that of the tensor that is changed in place."""
    for device in ("cpu", "cuda"):

        def autocast_impl(*args: Any, _device: str = device) -> Any:
            dtype = args[mutated[0]].dtype if mutated else torch.get_autocast_dtype(_device)
            bound = list(args)
            for i, value in enumerate(args):
                if not isinstance(value, Tensor) or value.dtype not in FLOATS[:3]:
                    continue
                # Parameters in the other 16-bit dtype follow, those in float32 stay.
                if i in cast or (value.dtype != torch.float32 and i not in mutated):
                    bound[i] = value.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys):
                return overload(*bound)

        _library.impl(name, autocast_impl, f"Autocast{device.upper()}")
