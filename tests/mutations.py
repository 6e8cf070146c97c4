"""The mutations of a module's source, which `mutants.py` runs: one changed place each.

Changed are comparisons, arithmetic and bitwise operators, `and` and `or`, `not`, signs, numbers,
truth values and conditions. Unchanged are annotations, docstrings, what is raised or warned of,
f-strings, `__all__`, imports, and what only type checkers read.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
MESSAGES = ("InputError", "warn", "warning", "TypeVar")  # calls whose arguments are not changed
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Mutation:
    """One changed place.

    Attributes:
        scope: qualified name of the function or class, "" for the module.
        line: source line at which the changed expression begins, without indentation.
        change: "before -> after", both as `ast.unparse` writes them.
        count: number of equal mutations earlier in the same scope.
        lines: numbers of lines of which a test that notices the change executes at least one;
            empty if these are not known, as in the body of a module.
        apply: changes the tree from which the mutation was found.
    """

    scope: str
    line: str
    change: str
    count: int
    lines: range
    apply: Callable[[], None]

    @property
    def key(self):
        """Text that identifies the mutation within its module, whatever its line number."""
        return " | ".join([self.scope, self.line, self.change, str(self.count)])


def find_mutations(source):
    """Return the syntax tree of a source text, and its mutations in their order in the text."""
    tree = ast.parse(source)
    skipped = _skipped(tree)
    source_lines, counts, mutations = source.splitlines(), Counter(), []
    for node, scope, lines in _places(tree, "", range(0)):
        if id(node) in skipped:
            continue
        for target, field, value in _changes(node):
            place = node.test if field == "test" else node  # a negated condition
            before = ast.unparse(place).strip()
            after = ast.unparse(_changed_copy(node, field, value, is_test=field == "test")).strip()
            line = source_lines[place.lineno - 1].strip()
            content = (scope, line, f"{before} -> {after}")

            def apply(target=target, field=field, value=value):
                setattr(target, field, value)
                ast.fix_missing_locations(tree)

            mutations.append(Mutation(*content, counts[content], lines, apply))
            counts[content] += 1
    return tree, mutations


def _changed_copy(node, field, value, *, is_test):
    if is_test:
        return value
    changed = copy.copy(node)
    setattr(changed, field, value)
    return changed


def _changes(node):
    """Return (node, field, new value) of each change of a node."""
    changes = []
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            operators = [*node.ops[:i], SWAPPED[type(operator)](), *node.ops[i + 1 :]]
            changes.append((node, "ops", operators))
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
        left = getattr(node, "left", None)
        if not (isinstance(left, ast.Constant | ast.JoinedStr) and _is_text(left)):
            changes.append((node, "op", SWAPPED[type(node.op)]()))
    elif isinstance(node, ast.UnaryOp):
        opposite = ast.UAdd() if isinstance(node.op, ast.USub) else None
        if opposite:
            changes.append((node, "op", opposite))
        elif not isinstance(node.op, ast.UAdd):  # `not` and ~: apply it twice
            changes.append((node, "operand", ast.UnaryOp(node.op, node.operand)))
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = node.value
        new = {bool: not value, int: value + 1, float: value * 1.25 + 0.01}[type(value)]
        changes.append((node, "value", new))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        if not _is_negated_otherwise(node.test):
            changes.append((node, "test", ast.UnaryOp(ast.Not(), node.test)))
    elif isinstance(node, ast.comprehension) and node.ifs:
        negated = [ast.UnaryOp(ast.Not(), node.ifs[0]), *node.ifs[1:]]
        changes.append((node, "ifs", negated))
    return changes


def _is_negated_otherwise(test):
    """Whether another mutation of a condition is its negation."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn)
    return isinstance(test, ast.Constant | ast.UnaryOp)


def _is_text(node):
    return isinstance(node, ast.JoinedStr) or isinstance(node.value, str)


def _places(node, scope, lines):
    """Yield (node, scope, lines) of all nodes of a tree, depth first."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            inner_scope, inner_lines = scope, lines
            if isinstance(child, (*FUNCTIONS[:2], ast.ClassDef)):
                inner_scope = f"{scope}.{child.name}" if scope else child.name
            if isinstance(node, FUNCTIONS) and field in {"args", "decorator_list"}:
                # Defaults and decorators run at import; a test that notices them runs the body.
                inner_lines = _span(node) if isinstance(node, FUNCTIONS[:2]) else lines
            elif isinstance(child, ast.stmt):
                inner_lines = _header(child) if lines or isinstance(node, FUNCTIONS) else range(0)
            if isinstance(child, ast.expr | ast.stmt):
                yield child, inner_scope, inner_lines
            elif isinstance(child, ast.comprehension) and child.ifs:
                child.lineno = child.ifs[0].lineno
                yield child, inner_scope, inner_lines
            yield from _places(child, inner_scope, inner_lines)


def _span(node):
    return range(node.body[0].lineno, node.end_lineno + 1)


def _header(statement):
    """Return the lines of a statement without those of the statements in it."""
    body = getattr(statement, "body", None)
    end = body[0].lineno if body else statement.end_lineno + 1
    return range(statement.lineno, max(end, statement.lineno + 1))


def _skipped(tree):
    """Return the ids of the nodes that are not changed."""
    roots = []
    for node in ast.walk(tree):
        roots += [getattr(node, field, None) for field in ("annotation", "returns")]
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Raise):
            roots.append(node)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            roots.append(node if name in MESSAGES else None)
        elif isinstance(node, ast.Assign):
            is_all = any(getattr(target, "id", "") == "__all__" for target in node.targets)
            roots.append(node if is_all else None)
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            roots.append(node)
    return {id(inner) for root in roots if root is not None for inner in ast.walk(root)}
