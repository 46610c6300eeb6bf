"""Faults of one line: every place of a module where an operator, a constant, a name or a statement can be wrong.

`faults` goes through a tree in a fixed order, so a fault is known by its number. Texts for people (messages, logs,
docstrings), annotations and imports are left alone.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitXor: ast.BitOr,
}
OTHER_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
OTHER_METHODS = {"floor": "ceil", "ceil": "floor", "sum": "mean", "mean": "sum", "min": "max", "max": "min"}
WORD = re.compile(r"[A-Za-z0-9_.\-]+")  # a string that names something, and no sentence
LOGGING = ("log", "logging", "warnings", "print")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Fault:
    """One wrong place. `apply` puts it into the tree that it was found in."""

    line: int
    function: str  # the qualified name of the outermost function that holds it; empty: it acts when a module loads
    before: ast.AST | str
    after: ast.AST | str
    apply: Callable[[], None]

    @property
    def change(self) -> str:
        """Such as "a < b → a <= b"."""
        return f"{_text(self.before)} → {_text(self.after)}"


@dataclass(frozen=True)
class Scope:
    """Where the walk is. `kinds`: the names in reach that have an annotation; `fields`: the same for `self.…`."""

    names: tuple[str, ...] = ()
    function: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def faults(tree: ast.Module) -> Iterator[Fault]:
    """Every fault that can be put into `tree`, in the order of the code."""
    yield from _children(tree, Scope())


def _children(node: ast.AST, scope: Scope) -> Iterator[Fault]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment", "ctx", "type_params"):
            continue
        if isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, ast.AST):
                    yield from _visit(child, scope, lambda new, value=value, i=i: value.__setitem__(i, new))
        elif isinstance(value, ast.AST):
            yield from _visit(value, scope, lambda new, name=name: setattr(node, name, new))


def _visit(node: ast.AST, scope: Scope, put: Callable[[ast.AST], None]) -> Iterator[Fault]:
    """The faults of `node` itself and of what is in it. `put` replaces it."""
    if _is_for_people(node):
        if isinstance(node, ast.Raise):
            yield _statement(node, scope, put)
        return

    def fault(new: ast.AST, before: ast.AST | str = node, after: ast.AST | str | None = None) -> Fault:
        return Fault(node.lineno, scope.function, before, after or new, lambda: put(ast.copy_location(new, node)))

    if isinstance(node, ast.stmt):
        yield from _of_statement(node, scope, put, fault)
    else:
        for new in _of_expression(node, scope):
            yield fault(new)
    if isinstance(node, FUNCTIONS):
        yield from _function(node, scope)
    elif isinstance(node, ast.ClassDef):
        fields = {s.target.id: _text(s.annotation) for s in node.body if _is_field(s)}
        yield from _children(node, Scope((*scope.names, node.name), scope.function, scope.kinds, fields))
    else:
        yield from _children(node, scope)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> Iterator[Fault]:
    """Defaults act where the function is defined; the body acts when it is called."""
    names = (*scope.names, node.name)
    yield from _children(node.args, scope)
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    kinds = scope.kinds | {a.arg: _text(a.annotation) for a in arguments if a.annotation is not None}
    inner = Scope((*names, "<locals>"), scope.function or ".".join(names), kinds, scope.fields)
    for i, child in enumerate(node.body):
        yield from _visit(child, inner, lambda new, i=i: node.body.__setitem__(i, new))


def _of_statement(
    node: ast.stmt, scope: Scope, put: Callable[[ast.AST], None], fault: Callable[..., Fault]
) -> Iterator[Fault]:
    if _has_an_effect(node):
        yield _statement(node, scope, put)
    elif isinstance(node, ast.AugAssign):
        yield _statement(node, scope, put)
        if other := ARITHMETIC.get(type(node.op)):
            changed = copy.copy(node)
            changed.op = other()
            yield fault(changed)
    elif isinstance(node, ast.Return) and node.value is not None and _text(node.value) not in ("None", "self"):
        yield fault(ast.copy_location(ast.Return(ast.copy_location(ast.Constant(None), node)), node))
    elif isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp | ast.Constant):
        changed = copy.copy(node)
        changed.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        yield fault(changed, f"if {_text(node.test)}", f"if not ({_text(node.test)})")


def _statement(node: ast.stmt, scope: Scope, put: Callable[[ast.AST], None]) -> Fault:
    """The statement is forgotten."""
    return Fault(node.lineno, scope.function, node, "nothing", lambda: put(ast.copy_location(ast.Pass(), node)))


def _of_expression(node: ast.AST, scope: Scope) -> Iterator[ast.expr]:
    """What may stand in the place of an expression."""
    if isinstance(node, ast.Compare):
        for other in COMPARISONS[type(node.ops[0])]:
            yield ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)
        if len(node.ops) > 1:
            for other in COMPARISONS[type(node.ops[-1])]:
                yield ast.Compare(node.left, [*node.ops[:-1], other()], node.comparators)
    elif isinstance(node, ast.BinOp):
        yield from _of_operator(node)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
        for i in range(len(node.values)):
            rest = [value for j, value in enumerate(node.values) if j != i]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Slice):
        yield from _of_slice(node)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in scope.kinds:
        yield from (ast.Name(other, ast.Load()) for other in _same_kind(scope.kinds, node.id))
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _text(node.value) == "self":
        yield from (ast.Attribute(node.value, other, ast.Load()) for other in _same_kind(scope.fields, node.attr))
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield from _without_filters(node)
    elif isinstance(node, ast.Dict):
        for i in range(len(node.keys)):
            yield ast.Dict(
                [k for j, k in enumerate(node.keys) if j != i], [v for j, v in enumerate(node.values) if j != i]
            )


def _of_operator(node: ast.BinOp) -> Iterator[ast.expr]:
    sides = (node.left, node.right)
    if any(isinstance(side, ast.JoinedStr) or _is_string(side) for side in sides):
        return  # a text
    if isinstance(node.op, ast.Add) and any(isinstance(side, ast.List | ast.Tuple | ast.ListComp) for side in sides):
        yield node.left
        yield node.right
    elif isinstance(node.op, ast.Div) and _is_path(node):
        return
    elif other := ARITHMETIC.get(type(node.op)):
        yield ast.BinOp(node.left, other(), node.right)


def _of_constant(node: ast.Constant) -> Iterator[ast.expr]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)
        yield ast.Constant(value / 2 if value else -1.0)
    elif isinstance(value, str) and WORD.fullmatch(value):
        yield ast.Constant(f"{value}_")


def _of_call(node: ast.Call) -> Iterator[ast.expr]:
    if isinstance(node.func, ast.Name) and node.func.id in OTHER_CALLS:
        changed = copy.copy(node)
        changed.func = ast.copy_location(ast.Name(OTHER_CALLS[node.func.id], ast.Load()), node.func)
        if node.func.id in ("sorted", "reversed"):
            changed.keywords = []
        yield changed
    if isinstance(node.func, ast.Attribute) and node.func.attr in OTHER_METHODS:
        changed = copy.copy(node)
        changed.func = copy.copy(node.func)
        changed.func.attr = OTHER_METHODS[node.func.attr]
        yield changed
    symmetric = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
    for i in range(0 if symmetric else len(node.args) - 1):
        pair = node.args[i : i + 2]
        if all(isinstance(argument, ast.Name | ast.Attribute | ast.Subscript) for argument in pair):
            changed = copy.copy(node)
            changed.args = [*node.args[:i], *reversed(pair), *node.args[i + 2 :]]
            yield changed
    for keyword in node.keywords:
        changed = copy.copy(node)
        changed.keywords = [other for other in node.keywords if other is not keyword]
        yield changed


def _of_slice(node: ast.Slice) -> Iterator[ast.expr]:
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if bound is not None and not isinstance(bound, ast.Constant):
            changed = copy.copy(node)
            setattr(changed, name, ast.copy_location(ast.BinOp(bound, ast.Add(), ast.Constant(1)), bound))
            yield changed


def _without_filters(node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> Iterator[ast.expr]:
    for i, generator in enumerate(node.generators):
        for j in range(len(generator.ifs)):
            changed = copy.copy(node)
            without = copy.copy(generator)
            without.ifs = [*generator.ifs[:j], *generator.ifs[j + 1 :]]
            changed.generators = [*node.generators[:i], without, *node.generators[i + 1 :]]
            yield changed


def _same_kind(kinds: dict[str, str], name: str) -> list[str]:
    """The next name with the same annotation, where there is one."""
    same = [other for other in kinds if kinds[other] == kinds.get(name)]
    if name not in same or len(same) < 2:
        return []
    return [same[(same.index(name) + 1) % len(same)]]


def _is_for_people(node: ast.AST) -> bool:
    """Whether it only makes a text, or nothing that runs."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Assert | ast.Global):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Assign) and _text(node.targets[0]) in ("log", "__all__"):
        return True
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and _text(call.func).split(".")[0] in LOGGING


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _has_an_effect(node: ast.stmt) -> bool:
    """Whether a statement may be forgotten without a name that is then missing."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Continue | ast.Break | ast.Delete)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_path(node: ast.BinOp) -> bool:
    """Whether a division joins paths: a number is never divided by a text or a name for one."""
    return bool(re.search(r"path|folder|\bhome\b|\bout\b", _text(node.left)))


def _text(node: ast.AST | str | None) -> str:
    """Of a statement, its first line."""
    if node is None or isinstance(node, str):
        return str(node)
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]
