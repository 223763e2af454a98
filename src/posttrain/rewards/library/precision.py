"""Whether two SymPy values are equal to six significant digits. math-verify rounds to six digits after the point, so
that 1e-7 equals 2e-7.

Used on pairs that math-verify calls equal only: False where their values differ, True where they cannot be evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

DIGITS = 5e-6  # relative, where one of the two was written as a decimal: half a unit of the sixth significant digit
EXACT = 1e-12  # relative, between exact expressions that are evaluated
_EVALUATED = 30  # digits


def agrees(gold: Any, said: Any) -> bool:
    """gold, said: expressions, equations, sets, intervals, tuples or matrices. Compared part by part where both have
    the same parts."""
    import sympy

    gold, said = _value_of(gold), _value_of(said)
    if gold == said:
        return True
    if isinstance(gold, sympy.MatrixBase) or isinstance(said, sympy.MatrixBase):
        return _in_order(list(gold), list(said)) if isinstance(gold, sympy.MatrixBase) and isinstance(said, sympy.MatrixBase) else True
    right, given = _ends(gold), _ends(said)
    if right is not None and given is not None:
        is_unordered = any(isinstance(each, sympy.FiniteSet) for each in (gold, said))
        return _in_any_order(right, given) if is_unordered else _in_order(right, given)
    if isinstance(gold, sympy.core.relational.Relational) and isinstance(said, sympy.core.relational.Relational):
        if isinstance(gold, sympy.Eq) and not (gold.lhs.is_Symbol and said.lhs == gold.lhs):
            return True  # scaled or rearranged: solved by math-verify
        return _in_order([gold.lhs, gold.rhs], [said.lhs, said.rhs]) or _in_order([gold.lhs, gold.rhs], [said.rhs, said.lhs])
    if isinstance(gold, sympy.Union) and isinstance(said, sympy.Union):
        return _in_any_order(gold.args, said.args)
    if isinstance(gold, sympy.Expr) and isinstance(said, sympy.Expr):
        return any(_near(a, b) for a in _percent_too(gold) for b in _percent_too(said))
    return True


def _value_of(value: Any) -> Any:
    """The element of a set that has only one."""
    import sympy

    if isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return value.args[0]
    return value


def _ends(value: Any) -> list[Any] | None:
    """The elements of a finite set or tuple, the ends of an interval; None for anything else."""
    import sympy

    if isinstance(value, (sympy.FiniteSet, sympy.Tuple)):
        return list(value.args)
    return [value.start, value.end] if isinstance(value, sympy.Interval) else None


def _in_order(gold: Sequence[Any], said: Sequence[Any]) -> bool:
    return len(gold) != len(said) or all(agrees(a, b) for a, b in zip(gold, said, strict=True))


def _in_any_order(gold: Sequence[Any], said: Sequence[Any]) -> bool:
    return all(any(agrees(a, b) for b in said) for a in gold) and all(any(agrees(a, b) for a in gold) for b in said)


def _percent_too(value: Any) -> Iterable[Any]:
    """math-verify takes 50 % for 0.5 and for 50, as a unit that may be left out."""
    import sympy

    yield value
    if isinstance(value, sympy.Mul) and len(value.args) == 2 and value.args[1] == sympy.UnevaluatedExpr(sympy.Rational(1, 100)):
        yield value.args[0]


def _near(gold: Any, said: Any) -> bool:
    """Two expressions, at one point if they have variables. True where one has no finite value there."""
    import sympy

    point = {name: sympy.Rational(17 + 2 * i, 11 + i) for i, name in enumerate(sorted(gold.free_symbols | said.free_symbols, key=str))}
    a, b = (sympy.N(each.subs(point).doit(), _EVALUATED) for each in (gold, said))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return True
    relative = DIGITS if gold.has(sympy.Float) or said.has(sympy.Float) else EXACT
    if _is_zero(a) and _is_zero(b):
        return True
    return bool(abs(a - b) <= relative * max(abs(a), abs(b)))


def _is_zero(value: Any) -> bool:
    """Zero, or what evaluating an expression leaves of it: a number without a digit that counts."""
    return bool(value == 0) or bool(value.is_Float and value._prec == 1)
