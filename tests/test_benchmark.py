import json

import pytest
import torch

from convnext_min import measure
from convnext_min.convnext import convnext_atto
from convnext_min.experiments import benchmark
from convnext_min.experiments.benchmark import Setting, Shape, Workload

EAGER = Setting("fp32", "NCHW", "eager")


@pytest.mark.parametrize("name", benchmark.IMPLEMENTATIONS)
def test_all_implementations_have_the_same_sizes_and_take_a_step(name):
    workload = Workload(name, Setting("bf16", "channels-last", "eager"), Shape("convnext_atto", 32, 2, "train"))
    assert measure.count_parameters(workload.model) == measure.count_parameters(convnext_atto())
    before = [parameter.detach().clone() for parameter in workload.model.parameters()]
    workload.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, workload.model.parameters()))


def test_the_outcome_names_every_setting_and_the_ratio_is_that_of_the_rounds(monkeypatch):
    pace = {"convnext_min": 30.0, "timm": 10.0}
    monkeypatch.setattr(Workload, "speed", lambda self, seconds: pace[self.name] * (2 if self.bf16 else 1))
    original = Workload.__init__

    def init(self, name, setting, shape):
        original(self, name, setting, shape)
        self.name, self.bf16 = name, setting.amp == "bf16"

    monkeypatch.setattr(Workload, "__init__", init)
    settings = [EAGER, EAGER._replace(amp="bf16")]
    outcome = benchmark.benchmark(["timm"], "convnext_atto", 32, 2, "infer", rounds=2, settings=settings)
    timm = outcome["results"]["timm"]
    assert timm["trials"] == {"fp32, NCHW, eager": 10.0, "bf16, NCHW, eager": 20.0}
    assert timm["setting"] == "bf16, NCHW, eager"
    assert timm["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert outcome["results"]["convnext_min"]["ratio"]["median"] == 1.0
    assert "ours is 3.00x (3.00-3.00)" in benchmark.report(outcome)


@pytest.mark.parametrize("able", [True, False])
def test_settings_are_the_whole_product_of_what_the_cpu_has_instructions_for(able, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able}, raising=False)
    settings = benchmark.native_settings()
    assert len(set(settings)) == (8 if able else 4)
    assert {setting.amp for setting in settings} == ({"fp32", "bf16"} if able else {"fp32"})


@pytest.fixture
def small(monkeypatch):
    """Options of a small benchmark of one setting that times nothing."""
    monkeypatch.setattr(benchmark, "native_settings", lambda: [EAGER])
    monkeypatch.setattr(Workload, "speed", lambda self, seconds: 10.0)
    return ["--model", "convnext_atto", "--resolution", "32", "--batch", "2", "--rounds", "1"]


def test_the_command_writes_what_it_measured(small, tmp_path, capsys):
    benchmark.main(["official", *small, "--mode", "infer", "--output", str(tmp_path)])
    outcome = json.loads((tmp_path / "infer-convnext_atto-32px-batch2.json").read_text())
    assert list(outcome["results"]) == ["convnext_min", "official"] and outcome["versions"]["torch"]
    assert "memory" not in outcome and "official" in capsys.readouterr().out


def test_a_benchmark_of_training_measures_memory_in_the_fastest_setting(small, tmp_path, monkeypatch, capsys):
    measured = []

    def added_memory(*arguments):
        measured.append(arguments)
        return 400_600_000

    monkeypatch.setattr(benchmark, "added_memory", added_memory)
    benchmark.main(["timm", *small, "--output", str(tmp_path)])
    outcome = json.loads((tmp_path / "train-convnext_atto-32px-batch2.json").read_text())
    shape = Shape("convnext_atto", 32, 2, "train")
    assert measured == [(benchmark.train, name, EAGER, shape) for name in ("convnext_min", "timm")]
    assert outcome["memory"]["timm"] == {"setting": str(EAGER), "megabytes": 401}
    assert "timm            401 MB  [fp32, NCHW, eager]" in capsys.readouterr().out


def test_memory_alone_is_measured_as_in_an_earlier_result(tmp_path):
    shape, contest = Shape("convnext_atto", 32, 2, "train"), tmp_path / "contest.json"
    contest.write_text(json.dumps(shape._asdict() | {"results": {"official": {"setting": str(EAGER)}}}))
    options = ["--memory-of", str(contest), "--output", str(tmp_path)]
    benchmark.main(["official", *options])
    outcome = json.loads((tmp_path / "memory-convnext_atto-32px-batch2.json").read_text())
    weights = 4e-6 * measure.count_parameters(convnext_atto())  # in MB; also gradients and AdamW's two moments
    assert outcome["resolution"] == 32 and outcome["machine"]["threads"]
    assert 4 * weights < outcome["memory"]["official"]["megabytes"] < 50 * weights
    with pytest.raises(SystemExit, match="the contest has no 'timm'; it has official"):
        benchmark.main(["timm", *options])
    contest.write_text(json.dumps(shape._replace(mode="infer")._asdict()))
    with pytest.raises(SystemExit, match="memory is measured in training, and the contest's mode is 'infer'"):
        benchmark.main(["official", *options])


@pytest.mark.parametrize(
    ("options", "valid"),
    [(["keras"], "convnext_min, official, timm"), (["timm", "--model", "resnet50"], "convnext_atto, convnext_femto")],
)
def test_unknown_names_are_refused_with_those_that_are_known(options, valid, tmp_path):
    with pytest.raises(SystemExit, match=f"unknown '.*'; valid: .*{valid}"):
        benchmark.main([*options, "--output", str(tmp_path)])


@pytest.mark.parametrize("options", [("--resolution", "16"), ("--batch", "0"), ("--rounds", "0")])
def test_sizes_that_are_too_small_are_refused(options, tmp_path):
    with pytest.raises(SystemExit, match="error: resolution must be at least 32, batch size and rounds at least 1"):
        benchmark.main(["timm", *options, "--output", str(tmp_path)])
