"""Recipes: files that say what they mean, and are refused where they don't."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm

from ghost_resnet import recipes
from ghost_resnet.errors import RecipeError
from ghost_resnet.recipes import Recipe, load_recipe, parse_override


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_of_the_package_is_valid_and_names_a_network(name: str) -> None:
    recipe = load_recipe(name)
    assert timm.is_model(recipe.arch)
    assert recipe == load_recipe(recipes.FOLDER / f"{name}.toml") == load_recipe(recipe)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_comes_back_from_its_toml_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).replace({"crop_scale": [0.2, 0.9], "model_args": {"drop_rate": 0.1, "layers": [1, 1]}})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == recipe


def test_the_package_has_the_report_s_recipe() -> None:
    assert "report" in recipes.names()


def test_best_has_the_stages_of_default_but_is_longer_and_larger() -> None:
    best, default = load_recipe("best"), load_recipe("default")
    assert best.epochs > default.epochs and best.img_size > best.size_at(0) > default.img_size
    assert (best.fit_head, best.start, best.teacher) == (default.fit_head, default.start, "") == (True, "auto", "")


def test_a_file_holds_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("# mine\nlr = 1\nmilestones = [3, 5]\n")
    recipe = load_recipe(path)
    assert recipe == dataclasses.replace(Recipe(), lr=1.0, milestones=(3, 5))
    assert isinstance(recipe.lr, float)


def test_every_setting_is_documented_once() -> None:
    documented = re.findall(r"^        (\w+): ", Recipe.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(Recipe)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "no 'learning_rate'; it has .*lr"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"lr": True}, "lr must be float, got True"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"decay_all": 1}, "decay_all must be bool, got 1"),
        ({"arch": 50}, "arch must be str, got 50"),
        ({"milestones": 60}, "milestones must be tuple"),
        ({"milestones": [60, "x"]}, "milestones must be int, got 'x'"),
        ({"model_args": [1]}, "model_args must be dict"),
        ({"crop": "square"}, "crop must be one of .*'padded'.*, got 'square'"),
        ({"crop_mode": "border"}, "crop_mode must be one of"),
        ({"normalize": "none"}, "normalize must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"img_size": -32}, "img_size must be at least"),
        ({"workers": -2}, "workers must be at least -1, got -2"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_with_what_came(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(changes)


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for content, message in [("lr = ", "no valid TOML"), ("speed = 1", "no 'speed'")]:
        path.write_text(content)
        with pytest.raises(RecipeError, match=message) as error:
            load_recipe(path)
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("source", ["no_such_recipe", "no/such/file.toml", Path("none.toml"), "."])
def test_an_unknown_recipe_is_refused_with_the_known_ones(source: str | Path) -> None:
    with pytest.raises(RecipeError, match=f"no recipe '{re.escape(str(source))}'.*report"):
        load_recipe(source)


def test_replacing_leaves_the_recipe_as_it_was() -> None:
    recipe = Recipe()
    changed = recipe.replace({"lr": 3, "milestones": (1,)})
    assert (recipe.lr, recipe.milestones) == (0.05, ()) and (changed.lr, changed.milestones) == (3.0, (1,))


def test_the_first_epochs_have_smaller_images() -> None:
    recipe = Recipe(epochs=5, img_size=224, smaller_first=((96, 1), (160, 2)))
    assert [recipe.size_at(epoch) for epoch in range(5)] == [96, 160, 160, 224, 224]
    assert Recipe(img_size=160).size_at(0) == 160


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=3e-4", ("lr", 3e-4)),
        (" epochs = 3 ", ("epochs", 3)),
        ("decay_all=true", ("decay_all", True)),
        ("milestones=[60, 120]", ("milestones", [60, 120])),
        ("model_args={ drop_rate = 0.1 }", ("model_args", {"drop_rate": 0.1})),
        ("arch=ghost_resnet50", ("arch", "ghost_resnet50")),
        ('arch="ghost_resnet50"', ("arch", "ghost_resnet50")),
        ("auto_augment=rand-m7-mstd0.5", ("auto_augment", "rand-m7-mstd0.5")),
        ("start=runs/a=b", ("start", "runs/a=b")),
        ("start=", ("start", "")),
    ],
)
def test_a_change_on_the_command_line_has_the_type_it_looks_like(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


def test_a_change_without_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected key=value, got 'lr'"):
        parse_override("lr")


@pytest.mark.parametrize(
    "change",
    [
        {"lr": float("nan")},
        {"lr": -0.1},
        {"hflip": 1.5},
        {"crop_pct": 1.2},
        {"crop_scale": (0.9, 0.5)},
        {"crop_scale": (0.5,)},
        {"interpolation": "lanczos"},
        {"epochs": 0},
        {"smaller_first": ((128, 30),)},
        {"smaller_first": ((128,),)},
        {"batch_size": 0},
    ],
)
def test_a_value_that_can_not_work_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(change))):
        Recipe().replace(change)
