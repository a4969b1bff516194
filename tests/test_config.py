"""Configuration files: precedence, types, and messages that name the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.config import build, dump, load_config, read_yaml, to_dict
from vlm.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    name: Literal["adamw", "off"] = "adamw"


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    folder: Path | None = None
    seeds: tuple[int, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    shuffle: bool = True
    scale: int | float | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    name: str = "run"
    steps: int = 10
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=5e-4, betas=(0.9, 0.999)))
    data: Data = Data()
    teacher: Optimizer | None = None
    extra: Any = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Needy:
    source: str
    inner: Run = Run()


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_defaults_base_file_and_overrides_in_that_order(write):
    write("base.yaml", "name: base\nsteps: 1\noptimizer: {lr: 0.1}\n")
    path = write("run.yaml", "base: base.yaml\nsteps: 2\noptimizer: {name: 'off'}\n")
    run = load_config(Run, path, ["optimizer.betas=[0.5, 0.6]", "data.seeds=[1, 2]"])
    assert (run.name, run.steps) == ("base", 2)
    assert run.optimizer == Optimizer(lr=0.1, betas=(0.5, 0.6), name="off")
    assert run.data.seeds == (1, 2)
    assert run.data.shuffle is True


def test_base_is_relative_to_its_own_file_and_nests(write):
    write("a/deep.yaml", "name: deep\nsteps: 1\n")
    write("a/middle.yaml", "base: deep.yaml\nsteps: 2\n")
    path = write("b/top.yaml", "base: ../a/middle.yaml\n")
    assert load_config(Run, path) == Run(name="deep", steps=2)


def test_naming_one_nested_key_keeps_the_defaults_of_the_others():
    assert load_config(Run, None, ["optimizer.name=off"]).optimizer == Optimizer(
        lr=5e-4, betas=(0.9, 0.999), name="off"
    )


def test_override_creates_absent_and_null_parents(write):
    path = write("run.yaml", "teacher: null\n")
    assert load_config(Run, path, ["teacher.lr=2"]).teacher == Optimizer(lr=2.0)
    assert load_config(Run, None, ["teacher.lr=2"]).teacher == Optimizer(lr=2.0)
    assert load_config(Run, None).teacher is None


def test_overrides_do_not_leak_through_yaml_aliases(write):
    path = write("run.yaml", "optimizer: &o {lr: 0.1}\nteacher: *o\n")
    run = load_config(Run, path, ["optimizer.lr=0.2"])
    assert run.optimizer.lr == 0.2
    assert run.teacher is not None and run.teacher.lr == 0.1


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_numbers_with_exponents_are_numbers(write, text):
    assert load_config(Run, write("run.yaml", f"optimizer: {{lr: {text}}}")).optimizer.lr == 1e-4
    assert load_config(Run, None, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


@pytest.mark.parametrize("text", ["no", "off", "yes", "1:30", "010", "2024-01-01", "0x", "1.2.3"])
def test_words_that_old_yaml_takes_for_something_else_stay_words(write, text):
    assert load_config(Run, write("run.yaml", f"name: {text}")).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x", r"unknown key 'nmae'; did you mean 'name'\?"),
        ("zzzzzz: x", r"unknown key 'zzzzzz'; known keys: name, steps"),
        ("optimizer: {lrr: 1}", r"optimizer: unknown key 'lrr'; did you mean 'lr'\?"),
        ("teacher: {lrr: 1}", r"teacher: unknown key 'lrr'; did you mean 'lr'\?"),
        ("steps: true", r"steps: expected int, got True"),
        ("steps: 1.5", r"steps: expected int, got 1.5"),
        ("steps: '3'", r"steps: expected int, got '3'"),
        ("optimizer: {lr: true}", r"optimizer.lr: expected float, got True"),
        ("optimizer: {lr: fast}", r"optimizer.lr: expected float, got 'fast'"),
        ("optimizer: {betas: [1]}", r"optimizer.betas: expected 2 values, got 1: \[1\]"),
        ("optimizer: {betas: 1}", r"optimizer.betas: expected a list, got 1"),
        ("optimizer: {name: sgd}", r"optimizer.name: expected one of 'adamw', 'off', got 'sgd'"),
        ("optimizer: 3", r"optimizer: expected a mapping of Optimizer, got 3"),
        ("optimizer: null", r"optimizer: expected a mapping of Optimizer, got None"),
        ("data: {shuffle: 1}", r"data.shuffle: expected bool, got 1; write true or false"),
        ("data: {shuffle: yes}", r"data.shuffle: expected bool, got 'yes'; write true or false"),
        ("data: {seeds: [1, x]}", r"data.seeds\[1\]: expected int, got 'x'"),
        ("data: {limits: {a: b}}", r"data.limits.a: expected int, got 'b'"),
        ("data: {limits: {1: 2}}", r"data.limits: expected str, got 1"),
        ("data: {scale: big}", r"data.scale: expected int or float or .* got 'big'"),
        ("data: {scale: true}", r"data.scale: expected int or float"),
        ("steps: -1", r"steps must not be negative, got -1"),
        ("[1, 2]", r"expected a mapping at the top, got list"),
        ("a: [", r"cannot be read as YAML"),
        ("steps: 1\nsteps: 2", r"the key 'steps' is given twice"),
        ("name: !!python/object/apply:os.getcwd []", r"cannot be read as YAML"),
        ("[" * 5000, r"cannot be read as YAML"),
        ("base: [a, b]", r"'base:' must be the path of a config file"),
        ("base: absent.yaml", r"absent.yaml: no such config file$"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(write, text, message):
    path = write("run.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Run, path)
    assert str(path.parent) in str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_shipped_file_is_named_where_it_is_missed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the one that came with vlm is /.*/configs/train/digits\.yaml"):
        load_config(Run, Path("configs/train/digits.yaml"))


def test_missing_folder_and_binary_files(write, tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such config file"):
        load_config(Run, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Run, tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_config(Run, binary)


def test_empty_file_means_the_defaults(write):
    assert load_config(Run, write("empty.yaml", "# nothing\n")) == Run()


def test_circles_are_found(write):
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: c.yaml")
    write("c.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml"):
        read_yaml(write("top.yaml", "base: a.yaml"))
    with pytest.raises(ConfigError, match="circle"):
        read_yaml(write("self.yaml", "base: self.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", r"expected --set key=value"),
        ("=3", r"expected --set key=value"),
        ("a..b=3", r"expected --set key=value"),
        ("setps=3", r"unknown key 'setps'; did you mean 'steps'\?"),
        ("optimizer.lrr=3", r"optimizer: unknown key 'lrr'; did you mean 'lr'\?"),
        ("steps=many", r"steps: expected int, got 'many'"),
        ("steps=", r"steps: expected int, got None"),
        ("steps=[1", r"--set steps: the value is not YAML"),
        ("steps=-3", r"steps must not be negative"),
        ("name.first=x", r"name: expected str, got \{'first': 'x'\}"),
    ],
)
def test_a_wrong_override_is_a_usage_error(write, override, message):
    path = write("run.yaml", "steps: 2")
    for file in (None, path):
        with pytest.raises(UsageError, match=message) as caught:
            load_config(Run, file, [override])
        assert caught.value.exit_code == 2


def test_a_wrong_file_stays_the_files_fault_beside_a_right_override(write):
    path = write("run.yaml", "stepz: 2")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key 'stepz'"):
        load_config(Run, path, ["name=x"])


def test_an_override_can_give_what_the_file_lacks(write):
    path = write("run.yaml", "inner: {steps: 3}")
    with pytest.raises(ConfigError, match=r"run\.yaml: Needy needs source"):
        load_config(Needy, path)
    assert load_config(Needy, path, ["source=here"]) == Needy(source="here", inner=Run(steps=3))
    with pytest.raises(ConfigError, match=r"run\.yaml: Needy needs source"):
        load_config(Needy, path, ["inner.steps=4"])


def test_literals_do_not_take_true_for_one():
    @dataclass(frozen=True)
    class Levels:
        level: Literal[1, 2] = 1

    assert build(Levels, {"level": 2}).level == 2
    with pytest.raises(ConfigError, match="expected one of 1, 2, got True"):
        build(Levels, {"level": True})


def test_paths_and_unions_convert():
    data = build(Data, {"folder": "a/b", "scale": 2})
    assert data.folder == Path("a/b")
    assert data.scale == 2 and type(data.scale) is int
    assert build(Data, {"scale": "auto"}).scale == "auto"
    assert build(Data, {"scale": 2.5}).scale == 2.5


def test_to_dict_is_plain():
    run = Run(data=Data(folder=Path("x"), seeds=(1, 2), limits={"a": 1}))
    plain = to_dict(run)
    assert plain["data"] == {
        "folder": "x",
        "seeds": [1, 2],
        "limits": {"a": 1},
        "shuffle": True,
        "scale": "auto",
    }
    assert plain["optimizer"]["betas"] == [0.9, 0.999]


@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff")),
    lr=st.floats(allow_nan=False),
    seeds=st.lists(st.integers(-(2**70), 2**70)),
    shuffle=st.booleans(),
)
def test_dump_reads_back(tmp_path_factory, name, lr, seeds, shuffle):
    run = Run(name=name, optimizer=Optimizer(lr=lr), data=Data(seeds=tuple(seeds), shuffle=shuffle))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert load_config(Run, path) == run


@pytest.mark.parametrize(
    "name", ["1e-4", "off", "true", "null", "010", "~", "", "<<", "1:30", "a: b", "#", "-"]
)
def test_dump_quotes_what_would_read_back_as_something_else(tmp_path, name):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(Run(name=name)), encoding="utf-8")
    assert load_config(Run, path).name == name
