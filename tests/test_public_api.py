"""Names that users' scripts rely on: they exist, `__all__` is sorted and complete, configurations are frozen."""

import dataclasses
import importlib

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


@pytest.mark.parametrize("package", CONTRACT)
def test_contract_names_exist_and_all_is_sorted(package: str) -> None:
    module = importlib.import_module(f"structkd.{package}")
    assert module.__all__ == sorted(module.__all__), f"structkd.{package}.__all__ is not sorted"
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


def test_package_names() -> None:
    assert structkd.__all__ == sorted(structkd.__all__)
    for name in structkd.__all__:
        assert getattr(structkd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        structkd.nothing
