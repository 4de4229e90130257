"""What Triton's interpreter lacks: a fused multiply-add that rounds once, and speed.

Each function gives it one of these, for good; they are to be called before the first kernel runs.
"""

import functools
import operator
from typing import Any

import numpy as np


@functools.cache
def exact_fma() -> None:
    """Make `tl.fma` on float32 round once: in float64 the product is exact, and the sum has 29 spare bits."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return plain(self, x, y, z)
        return TensorHandle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return (x.astype(np.float64) * y + z).astype(np.float32)


@functools.cache
def patch_once() -> None:
    """Spare the interpreter two things that take nine tenths of its time.

    It patches triton.language anew at every call of one jitted function by another; here once and for all, as it never
    takes that back. And it sends every elementwise operation through the compiler's type checks; here those whose
    operands have one type, or are a tensor and a number, go straight to numpy.
    """
    from triton.runtime import interpreter

    plain, patched = interpreter._patch_lang, set()

    def patch_lang(fn):
        if id(fn.__globals__) not in patched:  # of a module, which stays
            patched.add(id(fn.__globals__))
            plain(fn)
            _quicken(interpreter)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def _quicken(interpreter: Any) -> None:
    tl = interpreter.tl
    templates: dict[Any, dict] = {}
    handle = object.__new__

    def wrap(data: np.ndarray, dtype: Any, block: bool) -> Any:
        key = dtype.name, data.shape if block else None
        if key not in templates:
            example = tl.tensor(None, tl.block_type(dtype, list(data.shape)) if block else dtype)
            templates[key] = vars(example)
        h = handle(interpreter.TensorHandle)
        h.data, h.dtype, h.attr = data, dtype, {}
        t = handle(tl.tensor)
        vars(t).update(templates[key], handle=h)
        return t

    def operands(tensors: tuple[Any, ...]) -> tuple[list[Any], Any, bool] | None:
        """Numpy operands, their one type, and whether one is a block; None where the slow way has to be gone."""
        first = next((t for t in tensors if type(t) is tl.tensor), None)
        if first is None:
            return None
        dtype, block, data = first.dtype, False, []
        if dtype not in (tl.float32, tl.float64, tl.int32, tl.int64, tl.int1):
            return None
        for t in tensors:
            if type(t) is tl.tensor and t.dtype == dtype:
                data.append(t.handle.data)
                block |= len(t.shape) > 0
            elif (type(t) is float and dtype.is_floating()) or (type(t) is int and dtype != tl.int1):
                data.append(first.handle.data.dtype.type(t))
            else:
                return None
        return data, dtype, block

    def elementwise(function: Any, slow: Any, result: Any = None) -> Any:
        def quick(*tensors, **options):
            found = None if options else operands(tensors)
            if found is None:
                return slow(*tensors, **options)
            data, dtype, block = found
            with np.errstate(all="ignore"):
                return wrap(function(*data), result or dtype, block)

        return quick

    def fma(x, y, z):
        return _fma(x, y, z) if z.dtype == np.float32 else x * y + z

    def select(slow: Any) -> Any:
        def where(condition, x, y):
            found = operands((x, y))
            if found is None or type(condition) is not tl.tensor:
                return slow(condition, x, y)
            data, dtype, block = found
            return wrap(np.where(condition.handle.data, *data), dtype, block or len(condition.shape) > 0)

        return where

    def shift(slow: Any) -> Any:
        def add(pointer, offset):
            if type(offset) is not tl.tensor or not pointer.dtype.is_ptr() or offset.dtype not in (tl.int32, tl.int64):
                return slow(pointer, offset)
            size = max(pointer.dtype.element_ty.primitive_bitwidth // 8, 1)
            data = pointer.handle.data + (offset.handle.data.astype(np.int64) * size).view(np.uint64)
            return wrap(data, pointer.dtype, len(pointer.shape) + len(offset.shape) > 0)

        return add

    def cast(slow: Any) -> Any:
        def to(tensor, dtype, **options):
            return tensor if tensor.dtype == dtype else slow(tensor, dtype, **options)

        return to

    arithmetic = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_}
    for name, function in arithmetic.items():
        setattr(tl.tensor, f"__{name}__", elementwise(function, getattr(tl.tensor, f"__{name}__")))
        if name != "and":
            reverse = elementwise(lambda a, b, f=function: f(b, a), getattr(tl.tensor, f"__r{name}__"))
            setattr(tl.tensor, f"__r{name}__", reverse)
    for name in ("lt", "le", "gt", "ge", "eq"):
        slow = getattr(tl.tensor, f"__{name}__")
        setattr(tl.tensor, f"__{name}__", elementwise(getattr(operator, name), slow, tl.int1))
    tl.tensor.__add__ = shift(tl.tensor.__add__)
    tl.tensor.to = cast(tl.tensor.to)
    tl.tensor.__neg__ = elementwise(operator.neg, tl.tensor.__neg__)
    tl.fma = elementwise(fma, tl.fma)
    tl.exp2 = elementwise(np.exp2, tl.exp2)
    tl.where = select(tl.where)
