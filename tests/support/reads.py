"""Which keys of the config's schema the package reads, found in its source.

A small flow-insensitive inference of types: it follows the schema's models from annotated
parameters through assignments, loops, attributes and calls. What it cannot follow it does not
count, so that it errs on the side of "nobody reads that".
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from pydantic import BaseModel

import gpumanager
from gpumanager.config import calls, memory, schema

PACKAGE = Path(gpumanager.__file__).parent
SCHEMA = (Path(calls.__file__), Path(memory.__file__), Path(schema.__file__))

Model = type[BaseModel]
Models = frozenset[Model]
NONE: Models = frozenset()

MODELS: dict[str, Model] = {
    name: each
    for module in (calls, memory, schema)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, calls.Model) and each is not calls.Model
}


def keys() -> set[tuple[str, str]]:
    """Every key, by the model that declares it. One that a model takes over from its base with
    another default only is the base's."""
    return {_owner(model, name) for model in MODELS.values() for name in model.model_fields}


def read_keys(files: Iterable[Path] | None = None) -> set[tuple[str, str]]:
    """Those of them that are read outside the schema, or by what is called of it from there."""
    search = _Search()
    for path in sorted(PACKAGE.rglob("*.py")) if files is None else files:
        if path not in SCHEMA:
            search.add(ast.parse(path.read_text(encoding="utf-8")))
    search.run()
    return search.read


def _owner(model: Model, name: str) -> tuple[str, str]:
    declaring = [each for each in model.__mro__ if name in inspect.get_annotations(each)]
    owner = declaring[0]
    for base in declaring[1:]:
        if owner.__annotations__[name] == base.__annotations__[name]:
            owner = base
    return owner.__name__, name


def _models_in(annotation: Any) -> Models:
    """The models in a type as it is at run time."""
    if isinstance(annotation, type) and issubclass(annotation, calls.Model):
        return frozenset([annotation])
    return frozenset().union(*map(_models_in, get_args(annotation)))


def _models_named(annotation: ast.AST | None) -> Models:
    """The models in a type as it is written."""
    if annotation is None:
        return NONE
    names = (each.id for each in ast.walk(annotation) if isinstance(each, ast.Name))
    return frozenset(MODELS[name] for name in names if name in MODELS)


class _Search:
    def __init__(self) -> None:
        self.read: set[tuple[str, str]] = set()
        self.called: set[tuple[Model, str]] = set()
        self.returns: dict[str, Models] = defaultdict(frozenset)
        self.fields: dict[str, Models] = defaultdict(frozenset)
        """Of the package's own classes, properties included, by their names alone."""
        self._trees: list[ast.Module] = []
        self._methods = _methods_of_schema()

    def add(self, tree: ast.Module) -> None:
        self._trees.append(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.returns[node.name] |= _models_named(node.returns)
                if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                    self.fields[node.name] |= _models_named(node.returns)
            elif isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                        self.fields[each.target.id] |= _models_named(each.annotation)

    def run(self) -> None:
        for _ in range(2):  # what one module sets another may read
            for tree in self._trees:
                _Scope(self).visit(tree)
        done: set[tuple[Model, str]] = set()
        while todo := self.called - done:
            for model, name in todo:
                done.add((model, name))
                function = self._methods.get((_defining(model, name), name))
                if function is not None:
                    _Scope(self, {"self": frozenset([model])}).body(function)

    def attribute(self, models: Models, name: str) -> Models:
        """What `.name` of one of `models` gives, noted as read."""
        found: set[Model] = set()
        for model in models:
            if name in model.model_fields:
                self.read.add(_owner(model, name))
                found |= _models_in(model.__annotations__.get(name)) | _field(model, name)
            elif hasattr(model, name):
                self.called.add((model, name))
                found |= _result(model, name)
        return frozenset(found)


def _field(model: Model, name: str) -> Models:
    return _models_in(model.model_fields[name].annotation)


def _result(model: Model, name: str) -> Models:
    """The models that a property or method of a model gives."""
    member = inspect.getattr_static(model, name)
    function = getattr(member, "fget", None) or getattr(member, "func", None) or member
    if not inspect.isfunction(function):
        return frozenset([model]) if name == "model_copy" else NONE
    given = get_type_hints(function).get("return")
    return frozenset([model]) if given is Self else _models_in(given)


def _defining(model: Model, name: str) -> str:
    return next((each.__name__ for each in model.__mro__ if name in each.__dict__), "")


def _methods_of_schema() -> dict[tuple[str, str], ast.FunctionDef]:
    return {
        (cls.name, each.name): each
        for path in SCHEMA
        for cls in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(cls, ast.ClassDef)
        for each in cls.body
        if isinstance(each, ast.FunctionDef)
    }


class _Scope:
    """One module, class or function: what its names stand for."""

    def __init__(
        self,
        search: _Search,
        names: dict[str, Models] | None = None,
        attributes: dict[str, Models] | None = None,
    ) -> None:
        self._search = search
        self._names = {} if names is None else names
        self._attributes = defaultdict[str, Models](frozenset) if attributes is None else attributes

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.ClassDef():
                inner = _Scope(self._search, dict(self._names))
                for _ in range(2):  # what one method sets another may read
                    for each in node.body:
                        inner.visit(each)
            case ast.FunctionDef() | ast.Lambda():
                _Scope(self._search, dict(self._names), self._attributes).body(node)
            case ast.Assign(targets=targets, value=value):
                found = self.resolve(value)
                for target in targets:
                    self._bind(target, found)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                found = self.resolve(value) if value is not None else NONE
                self._bind(target, found | _models_named(annotation))
            case ast.For(target=target, iter=source):
                self._bind(target, self.resolve(source))
                self._children(node)
            case ast.expr():
                self.resolve(node)
            case _:
                self._children(node)

    def body(self, function: ast.FunctionDef | ast.Lambda) -> None:
        arguments = function.args
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if each.arg != "self":
                self._names[each.arg] = _models_named(each.annotation)
        inside = function.body if isinstance(function, ast.FunctionDef) else [function.body]
        for statement in inside:
            self.visit(statement)

    def _children(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            self.visit(child)

    def _bind(self, target: ast.AST, models: Models) -> None:
        match target:
            case ast.Name(id=name):
                self._names[name] = self._names.get(name, NONE) | models
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                self._attributes[name] |= models
                if not name.startswith("_"):
                    self._search.fields[name] |= models
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._bind(part, models)

    def resolve(self, node: ast.AST) -> Models:
        """The models that an expression may give, or hold."""
        match node:
            case ast.Name(id=name):
                return self._names.get(name, NONE)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if "self" not in self._names:
                return self._attributes[name]
            case ast.Attribute(value=value, attr=name):
                models = self.resolve(value)
                if not models:
                    return self._search.fields.get(name, NONE)
                return self._search.attribute(models, name)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                given = [self.resolve(each) for each in (*arguments, *(k.value for k in keywords))]
                return self._called(function, given)
            case ast.NamedExpr(target=target, value=value):
                found = self.resolve(value)
                self._bind(target, found)
                return found
            case ast.Subscript(value=value, slice=index):
                self.resolve(index)
                return self.resolve(value)
            case ast.Lambda():
                self.visit(node)
                return NONE
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for each in node.generators:
                    self._bind(each.target, self.resolve(each.iter))
                    for condition in each.ifs:
                        self.resolve(condition)
                parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
                return frozenset().union(*map(self.resolve, parts))
            case ast.Compare():
                self._children(node)
                return NONE
            case _:
                inside = [e for e in ast.iter_child_nodes(node) if isinstance(e, ast.expr)]
                return frozenset().union(*map(self.resolve, inside))

    def _called(self, function: ast.expr, given: list[Models]) -> Models:
        found = self.resolve(function)
        match function:
            case ast.Attribute(value=value, attr="items" | "values" | "get" | "pop"):
                return found | self.resolve(value)
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in self._search.returns:
                return found | self._search.returns[name]
            case ast.Name(id="enumerate" | "sorted" | "reversed" | "tuple" | "list" | "map"):
                return found.union(*given)
        return found
