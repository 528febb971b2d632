"""Names that users' scripts rely on: they exist, `__all__` is sorted and complete, configurations are frozen."""

import dataclasses
import importlib
import inspect

import pytest

import structkd

CONTRACT = {
    "graph": [
        "DistillConfig", "TeacherConfig", "distill", "load", "score_nodes", "train_teacher",
    ],
    "ranking": ["CrossScorer", "DistillConfig", "distill", "load", "student"],
    "scores": ["CachedScorer", "TeacherSpec", "open", "publish", "verify"],
    "index": ["build", "build_text", "open"],
    "objectives": [
        "OBJECTIVES", "jensen_shannon", "kl", "listmle", "listnet", "margin_mse", "plackett_luce", "pointwise_mse",
        "ranknet", "reverse_kl",
    ],
}  # fmt: skip


def in_order(names: list[str]) -> list[str]:
    """The order that ruff's RUF022 keeps: CONSTANTS, then Classes, then the rest, each by its letters."""
    kind = lambda name: 0 if name.isupper() else 1 if name[0].isupper() else 2  # noqa: E731
    return sorted(names, key=lambda name: (kind(name), name))


@pytest.mark.parametrize("package", CONTRACT)
def test_contract_names_exist_and_all_is_sorted(package: str) -> None:
    module = importlib.import_module(f"structkd.{package}")
    assert module.__all__ == in_order(module.__all__), f"structkd.{package}.__all__ is not sorted"
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert [name for name in CONTRACT[package] if name not in module.__all__] == []


@pytest.mark.parametrize("package", ["graph", "ranking"])
def test_configurations_are_frozen(package: str) -> None:
    module = importlib.import_module(f"structkd.{package}")
    configurations = [getattr(module, name) for name in module.__all__ if name.endswith("Config")]
    assert configurations
    for configuration in configurations:
        assert dataclasses.is_dataclass(configuration)
        assert configuration.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_every_public_name_is_documented() -> None:
    for package in CONTRACT:
        module = importlib.import_module(f"structkd.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                assert value.__doc__, f"structkd.{package}.{name} has no docstring"


def test_the_order_itself() -> None:
    assert in_order(["verify", "Scorer", "READERS", "gc", "CachedScorer"]) == [
        "READERS", "CachedScorer", "Scorer", "gc", "verify",
    ]  # fmt: skip


def test_package_names() -> None:
    assert structkd.__all__ == in_order(structkd.__all__)
    for name in structkd.__all__:
        assert getattr(structkd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        structkd.nothing


def test_a_function_is_never_hidden_by_a_module_of_its_name() -> None:
    """Loading a submodule sets its name on the package: `ranking.distill` must stay the function all the same."""
    for package in CONTRACT:
        module = importlib.import_module(f"structkd.{package}")
        for name in module.__all__:
            getattr(module, name)  # loads the submodules of lazy packages
        values = {name: getattr(module, name) for name in module.__all__}
        assert [name for name, value in values.items() if inspect.ismodule(value) and hasattr(value, name)] == []
